"""The red team: hostile programs that must not pass, harm or stay, and unusual honest ones that
must pass.

Every hostile program is asked for a secret that only the judge has, so it passes only if something
leaked.
"""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tasks
from tasks import sandbox
from tasks.code import judge
from tasks.sandbox import execute

ROOT = Path(__file__).resolve().parent.parent

try:
    sandbox.sandbox_command()
    reason = ""
except ValueError as error:
    reason = str(error)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)

# What each tries. VICTIM is a folder outside that anybody may write to. Two tests are run, so that
# the first can try to spoil the second.
HOSTILE = {
    # results, forged
    "says that it passed": (
        'print(\'passed \' * 50, True, 1.0, \'{"passed": true, "status": "ran"}\')'
    ),
    "writes the runner's own records": (
        "import os\nos.write(1, b'ready' + b'%-16s%16d%16d' % (b'ran', 0, 0) * 9)"
    ),
    "writes to every descriptor": (
        "import os\nfor fd in range(3, 256):\n try: os.write(fd, b'ran')\n except OSError: pass"
    ),
    "ends with success": "import os\nos._exit(0)",
    "exits with success": "import sys\nsys.exit(0)",
    "raises SystemExit(0) from a thread": (
        "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()"
    ),
    "can't be ended": "import os, sys\nos._exit = sys.exit = lambda *a: None\nraise ValueError",
    "goes on as the runner": (
        "import os, sys\nos._exit = lambda *a: None\n"
        "for f in [sys._getframe(i) for i in range(4)]: print(f.f_locals.get('send'))\nsys.exit()"
    ),
    "sends through the runner's function": (
        "import sys\nf = sys._getframe()\nwhile f:\n for v in list(f.f_locals.values()):\n  if"
        " getattr(v, '__name__', '') == 'send': v(b'ran')\n f = f.f_back"
    ),
    "patches builtins": (
        "import builtins\nbuiltins.len = builtins.all = builtins.zip = lambda *a: True\n"
        "builtins.str = builtins.bytes = builtins.open = None"
    ),
    "patches os": "import os\nos.wait4 = os.kill = os.pread = os.memfd_create = os.fork = None",
    "patches sys.modules": "import sys\nfor n in list(sys.modules): sys.modules[n] = sys",
    "prints the number asked for by nobody": "print(float('nan'), float('inf'), 10 ** 4000)",
    "leaves a fork to be the main program": (
        "import os, time\nif os.fork(): os._exit(0)\ntime.sleep(.1)\nprint('x')"
    ),
    # secrets, looked for
    "walks the frames": (
        "import sys\nf = sys._getframe()\nwhile f:\n print(f.f_locals, f.f_globals)\n f = f.f_back"
    ),
    "walks the traceback": (
        "try: 1 / 0\nexcept Exception as e:\n f = e.__traceback__.tb_frame\n while f:\n"
        "  print(f.f_locals)\n  f = f.f_back"
    ),
    "walks the collector": (
        "import gc\nfor o in gc.get_objects():\n try: print(repr(o)[:10000])\n except Exception:"
        " pass"
    ),
    "reads its memory": (
        "import re\nfor line in open('/proc/self/maps'):\n a, b = (int(x, 16) for x in"
        " line.split()[0].split('-'))\n try:\n  m = open('/proc/self/mem', 'rb')\n  m.seek(a)\n "
        " print(*re.findall(rb'secret-[0-9a-f]{32}', m.read(b - a)))\n except (OSError,"
        " OverflowError, ValueError): pass"
    ),
    "reads the runner's memory": (
        "print(open('/proc/1/mem', 'rb').read(1), open('/proc/1/maps').read())"
    ),
    "reads the runner's descriptors": (
        "import os\nprint(os.listdir('/proc/1/fd'), open('/proc/1/fd/0').read())"
    ),
    "opens the runner's stdout": "open('/proc/1/fd/1', 'wb').write(b'ran')",
    "takes the runner's descriptors": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nfd = os.pidfd_open(1)\nfor n in"
        " range(20):\n g = c.syscall(438, fd, n, 0)\n if g >= 0: os.write(g, b'ran')"
    ),
    "traces the runner": (
        "import ctypes\nc = ctypes.CDLL(None)\nprint([c.ptrace(r, 1, 0, 0) for r in (16, 0x4206)])"
    ),
    "reads all processes": (
        "import glob\nfor p in glob.glob('/proc/[0-9]*/*'):\n try: print(open(p).read())\n"
        " except Exception: pass"
    ),
    "reads the environment": (
        "import os\nprint(os.environ, os.getcwd(), os.listdir(), open('/proc/1/cmdline').read())\n"
        "print(open('/proc/self/environ').read())"
    ),
    "reads all files": (
        "import os\nfor d, _, fs in os.walk('/'):\n if d.startswith(('/proc', '/usr', '/sys')):"
        " continue\n for f in fs[:20]:\n  if f.endswith(('.json', '.jsonl', '.txt')):"
        " print(open(os.path.join(d, f), 'rb').read())"
    ),
    "reads VICTIM": "import os\nprint(os.listdir('VICTIM'), open('VICTIM/kept').read())",
    "reads the users' files": (
        "import os\nprint(os.listdir('/home'), os.listdir('/etc'), open('/etc/passwd').read())"
    ),
    # the outside, attacked
    "writes to VICTIM": (
        "import os\nos.makedirs('VICTIM', exist_ok=True)\nopen('VICTIM/kept', 'w').write('gone')"
    ),
    "writes through a symlink": (
        "import os\nos.symlink('VICTIM/kept', '/tmp/l')\nopen('/tmp/l', 'w').write('gone')"
    ),
    "deletes VICTIM": "import shutil\nshutil.rmtree('VICTIM')",
    "writes everywhere": (
        "for d in ('/', '/usr', '/lib', '/dev', '/proc', '/root', '/site', '/proc/sys/kernel'):\n"
        " try: open(d + '/hostname', 'w').write('x'); print('wrote', d)\n except OSError: pass"
    ),
    "poisons the interpreter": "import os, json\nopen(json.__file__, 'a').write('x = 1')",
    "mounts": (
        "import ctypes\nc = ctypes.CDLL(None)\nprint([c.mount(b'x', b'/tmp', b'tmpfs', 0, 0),"
        " c.unshare(0x10000000)])"
    ),
    "escapes through chroot": "import os\nos.chroot('/tmp')",
    "becomes root": "import os\nos.setuid(0)\nprint(open('/etc/shadow').read())",
    "calls home": "import socket\ns = socket.create_connection(('1.1.1.1', 53), 1)",
    "calls a local server": (
        "import socket\nprint(socket.create_connection(('127.0.0.1', PORT), 1).recv(99).decode())"
    ),
    "calls an abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0TOKEN')\nprint(s.recv(9))"
    ),
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)",
    "kills all": "import os\nos.kill(-1, 9)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "interrupts and stops the runner": (
        "import os, signal\nfor s in range(1, 65):\n if s not in (9, 19): signal.signal(s,"
        " signal.SIG_IGN) if s not in (32, 33) else 0\n try: os.kill(1, s)\n except OSError: pass"
    ),
    "takes the runner's limits": (
        "import resource\nfor k in range(16): resource.prlimit(1, k, (0, 0))"
    ),
    "starves the runner": (
        "import os\nos.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))\nos.setpriority(0,"
        " 1, 19)"
    ),
    "reads the session's keys": (
        "print(open('/proc/keys').read())\nKEYCTL\n"
        "s = c.syscall(n + 2, 10, i(-3), b'user', b'TOKEN', 0)\n"
        "b = ctypes.create_string_buffer(99)\nc.syscall(n + 2, 11, s, b, 99)\nprint(b.value)"
    ),
    "plants a key": (
        "KEYCTL\nif c.syscall(n, b'user', b'planted', b'x', 1, i(-3)) < 0:\n"
        " raise OSError(ctypes.get_errno(), 'no keys')"
    ),
    "calls the machine's host": (
        "import socket\nfor cid in (0, 1, 2):\n s = socket.socket(40)\n s.settimeout(.2)\n"
        " s.connect((cid, 1024))"
    ),
    "traces its own child": (
        "import ctypes, os, time\np = os.fork()\nif not p: time.sleep(9)\n"
        "print(ctypes.CDLL(None).ptrace(16, p, 0, 0))"
    ),
    "calls in other numbers": (
        "import ctypes\nprint(ctypes.CDLL(None).syscall(0x40000000 | 41, 40, 1, 0))"
    ),
    # resources
    "hides CPU time by ignoring children": (
        "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nBURN"
    ),
    "hides CPU time by high halves": (
        "import ctypes, os\na = (1).to_bytes(8, 'little') + bytes(144)\nn = ctypes.c_ulong(17 | 1"
        " << 32)\nif ctypes.CDLL(None).syscall(134 if 'aarch64' in os.uname() else 13, n, a, None,"
        " 8): raise OSError('no')\nBURN"
    ),
    "hides memory in segments": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nc.shmat.restype ="
        " ctypes.c_void_p\nfor _ in range(6):\n s = c.shmget(0, 100 << 20, 0o1600)\n if s < 0:"
        " raise OSError(ctypes.get_errno(), 'no segment')\n a = ctypes.c_void_p(c.shmat(s, None,"
        " 0))\n ctypes.memset(a, 1, 100 << 20)\n c.shmdt(a)"
    ),
    "hides memory in memfds": (
        "import os\nfds = [os.memfd_create('x') for _ in range(50)]\n"
        "for fd in fds: os.write(fd, bytes(15 << 20))"
    ),
    "fills the place of its streams": (
        "for n in range(99):\n with open(f'/streams/TOKEN{n}', 'wb') as f: f.write(bytes(1 << 24))"
    ),
    "forbids the next test its streams": "import os\nos.chmod('/streams', 0)",
    "loops": "while True: pass",
    "loops and catches its timeout": (
        "import signal\nfor s in range(1, 65):\n try: signal.signal(s, lambda *a: None)\n except"
        " (OSError, ValueError): pass\nwhile True:\n try:\n  while True: pass\n except"
        " BaseException: pass"
    ),
    "sleeps": "import time\ntime.sleep(10 ** 6)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "waits for input that never comes": "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "hides CPU time in forks": "import os\nfor _ in range(4): os.fork()\nwhile True: pass",
    "forks": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "starts threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep,"
        " args=(99,)).start()"
    ),
    "leaves a daemon": (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(99)\n"
        " os._exit(0)"
    ),
    "leaves a daemon that writes": (
        "import os\nif os.fork() == 0:\n os.setsid()\n while True: os.write(1, b'late')"
    ),
    "takes memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "takes memory in many processes": (
        "import os, time\nfor _ in range(5): os.fork()\nx = b'x' * 10 ** 8\ntime.sleep(9)"
    ),
    "fills the disk": (
        "import os\nfor n in range(99):\n with open(f'/tmp/TOKEN{n}', 'wb') as f: f.write(bytes(1"
        " << 24))"
    ),
    "fills shared memory": (
        "for n in range(99):\n with open(f'/dev/shm/TOKEN{n}', 'wb') as f: f.write(bytes(1 << 24))"
    ),
    "makes a file of a terabyte": "with open('/tmp/TOKEN', 'wb') as f: f.truncate(1 << 40)",
    "floods stdout": "while True: print('x' * 10 ** 6)",
    "floods stderr": "import sys\nwhile True: print('x' * 10 ** 6, file=sys.stderr)",
    "opens too many files": "x = []\nwhile True: x.append(open('/dev/null'))",
    "nests too deeply to be parsed": "x = " + "(" * 5000 + ")" * 5000,
    "is one huge expression": "x = " + "-" * 200_000 + "1",
    "has a name without end": "x" * 10**6 + " = 1\nraise NameError('y' * 10 ** 8)",
    "breaks the C stack": "import ctypes\nctypes.string_at(0)",
    "recurses without end": "import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nf()",
    "holds a NUL": "print(1)\0",
    "holds a lone surrogate": "print('\ud800')",
    "prints invalid bytes": "import sys\nsys.stdout.buffer.write(bytes(range(128, 256)) * 100)",
    "has an error that can't be told": "class E(Exception):\n def __str__(self): raise E\nraise E",
    "has an error that never ends": (
        "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E"
    ),
    "refuses to die at exit": "import atexit\n@atexit.register\ndef f():\n while True: pass",
    "closes its streams": (
        "import os\nfor fd in range(3): os.close(fd)\nimport sys\nsys.stdout = sys.stderr = None"
    ),
}
KEYCTL = """import ctypes, os
i, n, c = ctypes.c_int, 217 if 'aarch64' in os.uname() else 248, ctypes.CDLL(None, use_errno=True)"""
BURN = """import time
for _ in range(9):
 r, w = os.pipe()
 if not os.fork():
  while time.process_time() < .2: pass
  os._exit(0)
 os.close(w)
 os.read(r, 1)"""
HOSTILE = {
    name: code.replace("KEYCTL", KEYCTL).replace("BURN", BURN) for name, code in HOSTILE.items()
}
HOSTILE_FUNCTIONS = {
    "equals everything": (
        "class E:\n def __eq__(s, o): return True\n def __hash__(s): return 0\ndef f(x): return E()"
    ),
    "is a text equal to everything": (
        "class E(str):\n def __eq__(s, o): return True\ndef f(x): return E('a')"
    ),
    "is a list equal to everything": (
        "class E(list):\n def __eq__(s, o): return True\ndef f(x): return E([1])"
    ),
    "reduces to a call": (
        "class E:\n def __reduce__(s): return (print, ('secret',))\ndef f(x): return E()"
    ),
    "patches json": (
        "import json\njson.dumps = lambda *a, **k: 'true'\njson.loads = lambda s: s\ndef f(x):"
        " return x"
    ),
    "patches json's encoder": (
        "import json.encoder\njson.encoder.JSONEncoder.default = lambda s, o: 0\ndef f(x):"
        " return {1}"
    ),
    "is not a number": "def f(x): return float('nan')",
    "is infinite": "def f(x): return [float('inf'), -float('inf')]",
    "is a huge number": "def f(x): return 10 ** 40_000",
    "is too deep for a reader": (
        "def f(x):\n print('[' * 10 ** 6)\n import os, sys\n sys.stdout.flush()\n os._exit(0)"
    ),
    "contains itself": "def f(x):\n a = []\n a.append(a)\n return a",
    "prints an answer and returns none": (
        "import os\ndef f(x):\n os.write(1, b'\"secret\"')\n os._exit(0)"
    ),
    "never ends as an iterator": "def f(x):\n while True: yield 1",
    "has a solution that is none": "Solution = 5\ndef g(x): return x",
    "has an array that lies": "class A:\n def tolist(s): return s\ndef f(x): return A()",
    "returns its callers' names": (
        "import inspect\ndef f(x): return [str(i.frame.f_locals) for i in inspect.stack()]"
    ),
}


def environment(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


@pytest.fixture
def outside(tmp_path_factory, monkeypatch):
    """A writable folder, a server and processes to be harmed; checks afterwards that all is as it
    was and nothing runs.
    """
    token = secrets.token_hex(16)
    monkeypatch.setitem(sandbox.ENVIRONMENT, "RED_TEAM", token)
    victim = tmp_path_factory.mktemp("victim")
    os.chmod(victim, 0o777)
    (victim / "kept").write_text(token)
    os.chmod(victim / "kept", 0o666)
    bystander = subprocess.Popen(["sleep", "600"])
    server, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + token)
    abstract.listen()
    yield (
        lambda code: (
            code.replace("VICTIM", str(victim))
            .replace("PORT", str(server.getsockname()[1]))
            .replace("TOKEN", token)
        )
    )
    for listening in (server, abstract):
        listening.settimeout(0)
        with pytest.raises(BlockingIOError):
            listening.accept()
        listening.close()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert [p.name for p in victim.iterdir()] == ["kept"] and (victim / "kept").read_text() == token
    assert not [name for name in os.listdir("/dev/shm") + os.listdir("/tmp") if token in name]
    deadline = time.monotonic() + 5  # the kernel may still be taking killed processes down
    while running := [
        p.parent.name for p in Path("/proc").glob("[0-9]*/environ") if token in environment(p)
    ]:
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.05)


def attack(code, outside, fn_name=None, time_limit=0.4):
    secret = "secret-" + secrets.token_hex(16)
    answers = [f'"{secret}"', f'["{secret}"]'] if fn_name else [secret, secret + "\n" + secret]
    inputs = ["1", "[2]"] if fn_name else ["1\n", "2\n"]
    found = judge(outside(code), inputs, answers, fn_name, time_limit, memory_mb=256)
    assert not found.passed and found.n_passed == 0 and found.status != "passed"
    assert len(found.feedback) <= 2000
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_program_passes(name, outside):
    attack(HOSTILE[name], outside)


@pytest.mark.parametrize("name", HOSTILE_FUNCTIONS)
def test_no_hostile_function_passes(name, outside):
    attack(HOSTILE_FUNCTIONS[name], outside, "f")


def test_the_attacks_are_felt(outside):
    """Some of the above must fail for the right reason, or they would test nothing."""
    for name, said in {
        "reads the runner's memory": "Permission denied",
        "opens the runner's stdout": "Permission denied",
        "traces the runner": "[-1, -1]",
        "mounts": "[-1, -1]",
        "calls home": "Network is unreachable",
        "escapes through chroot": "not permitted",
        "reads VICTIM": "No such file",
        "calls a local server": "Connection refused",
        "starts threads": "can't start new thread",
        "becomes root": "Invalid argument",
        "takes memory": "MemoryError",
        "floods stdout": "File too large",
        "reads the session's keys": "Permission denied",
        "plants a key": "[Errno 1] no keys",
        "calls the machine's host": "not supported",
        "traces its own child": "-1",
        "calls in other numbers": "exit code -31",
        "hides memory in segments": "[Errno 1] no segment",
        "hides memory in memfds": "[Errno 1] Operation not permitted",
        "hides CPU time by ignoring children": "not permitted",
        "hides CPU time by high halves": "OSError: no",
        "takes memory in many processes": "too much memory",
        "fills the disk": "No space left",
        "fills shared memory": "No space left",
        "makes a file of a terabyte": "File too large",
        "loops": "Time Limit",
        "sleeps": "Time Limit",
        "hides CPU time in forks": "Time Limit",
    }.items():
        # zeroing memory takes time
        found = attack(HOSTILE[name], outside, time_limit=0.4 if said == "Time Limit" else 5)
        assert said in found.feedback, name
    wrote = list(execute(outside(HOSTILE["writes everywhere"]), [""]))[0]
    assert wrote == ("ran", b"", "")


def test_the_keys_of_the_session_stay_outside():
    """A process with a key in its session's keyring judges programs that look for it and that plant
    another.
    """
    code = """import ctypes, os, sys
from tasks.code import judge
numbers, i = ctypes.CDLL(None), ctypes.c_int
n = 217 if "aarch64" in os.uname() else 248
if numbers.syscall(n + 2, 1, b"red-team") < 0 or numbers.syscall(n, b"user", b"TOKEN", b"secret-key", 10, i(-3)) < 0:
    sys.exit(9)  # this kernel has no keys
read, plant = sys.argv[1:]
print(judge(read.replace("print(open('/proc/keys').read())", ""), ["1"], ["b'secret-key'"]), judge(plant, ["1"], [""]))
print(numbers.syscall(n + 2, 10, i(-3), b"user", b"TOKEN", 0) > 0, numbers.syscall(n + 2, 10, i(-3), b"user", b"planted", 0))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, HOSTILE["reads the session's keys"], HOSTILE["plants a key"]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 9:
        pytest.skip("this kernel has no keys")
    assert "passed=True" not in done.stdout and done.stdout.endswith("True -1\n"), (
        done.stdout + done.stderr
    )


def test_memory_that_processes_share_counts_once():
    code = (
        "from multiprocessing import Pool\nimport time\nx = b'x' * (200 << 20)\ndef f(i):\n y = x\n"
        " time.sleep(.3)\n return y[i]\nif __name__ == '__main__':\n with Pool(4) as p:"
        " print(sum(p.map(f, range(4), 1)))"
    )
    assert judge(code, [""], ["480"], memory_mb=700).passed  # five processes see 200 MiB each
    copied = judge(code.replace("y = x", "y = x + b'y'"), [""], ["480"], memory_mb=700)
    assert "too much memory" in copied.feedback
    hidden = (  # then nobody can say what it shares
        "y = x\n import ctypes\n ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)"
    )
    assert (
        "too much memory"
        in judge(code.replace("y = x", hidden), [""], ["480"], memory_mb=700).feedback
    )


def test_an_input_that_the_sandbox_cannot_hold_is_refused():
    size = sandbox.DISK
    assert judge(
        "import sys\nprint(len(sys.stdin.buffer.read()))", ["x" * size], [str(size)]
    ).passed
    with pytest.raises(ValueError, match=f"an input of {size + 1} bytes is too large"):
        judge("", ["", "x" * (size + 1)], ["", ""])


def test_processes_are_counted():
    code = "import os, time\nwhile os.fork(): pass\ntime.sleep(9)"
    assert "Resource temporarily unavailable" in judge(code, [""], [""], memory_mb=4096).feedback


# Honest programs that some harness fails. Each: code, [(input, output)], and the function's name
# where there is one.
HONEST = {
    "global at top level": (
        "global n\nn = int(input())\ndef f():\n global n\n n += 1\nf()\nprint(n)",
        [("1\n", "2")],
    ),
    "sys.stdin.buffer": (
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
        [("1 2\n3\n", "6")],
    ),
    "sys.stdin.buffer.readline": (
        "import sys\nr = sys.stdin.buffer.readline\na = int(r())\nprint(a, int(r()))",
        [("1\n2\n", "1 2")],
    ),
    "iterating stdin": (
        "import sys\nfor line in sys.stdin: print(int(line) * 2)",
        [("1\n2\n", "2\n4")],
    ),
    "iterating stdin's buffer": (
        "import sys\nfor line in sys.stdin.buffer: print(int(line) * 2)",
        [("1\n2\n", "2\n4")],
    ),
    "open(0)": ("print(open(0).read().split()[-1])", [("a b", "b")]),
    "open('/dev/stdin')": ("print(open('/dev/stdin').read().split()[-1])", [("a b", "b")]),
    "os.read(0)": ("import os\nprint(os.read(0, 10 ** 6).decode().upper())", [("ab\n", "AB")]),
    "os.write and os._exit": (
        "import os\nos.write(1, input().encode())\nos._exit(0)",
        [("ab\n", "ab")],
    ),
    "a rewound stdin": (
        "import sys\na = input()\nsys.stdin.seek(0)\nprint(a == input())",
        [("x\n", "True")],
    ),
    "a mapped stdin": (
        "import mmap\nprint(mmap.mmap(0, 0, prot=mmap.PROT_READ)[:].decode())",
        [("x\ny", "x\ny")],
    ),
    "quit()": ("print(input())\nquit()\nprint('no')", [("x\n", "x")]),
    "exit() in a function": ("def f():\n print(1)\n exit()\nf()", [("", "1")]),
    "sys.exit after the answer": ("import sys\nprint(input())\nsys.exit(1)", [("x\n", "x")]),
    "SystemExit with a message": ("print(7)\nraise SystemExit('done')", [("", "7")]),
    "a main guard that is not last": (
        "if __name__ == '__main__':\n print(input())\n\nx = 1\n",
        [("y\n", "y")],
    ),
    "a main function before a guard": (
        'def main():\n print(input())\nif __name__ == "__main__": main()',
        [("y\n", "y")],
    ),
    "from __future__": (
        "from __future__ import annotations\ndef f(x: Unknown): return x\nprint(f(3))",
        [("", "3")],
    ),
    "print as stdout.write": (
        (
            "from sys import stdin, stdout\ninput = stdin.readline\nprint ="
            " stdout.write\nprint(input())"
        ),
        [("x\n", "x")],
    ),
    "a replaced stdout": (
        (
            "import sys, io, os\nsys.stdout = io.BytesIO()\nsys.stdout.write(b'5')\n"
            "os.write(1, sys.stdout.getvalue())"
        ),
        [("", "5")],
    ),
    "a wrapper of stdout": (
        "import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb'), 'utf-8')\nprint('ä')",
        [("", "ä")],
    ),
    "redirect_stdout": (
        (
            "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b):"
            " print('a')\nprint(b.getvalue() * 2)"
        ),
        [("", "a\na\n\n")],
    ),
    "output in a thread with a large stack": (
        (
            "import sys, threading\nsys.setrecursionlimit(10 ** 7)\nthreading.stack_size(1 <<"
            " 28)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nt ="
            " threading.Thread(target=lambda: print(f(200_000)))\nt.start()"
        ),
        [("", "200000")],
    ),
    "output at exit": ("import atexit\natexit.register(lambda: print('bye'))", [("", "bye")]),
    "output that nobody flushes": ("import sys\nprint('a')\nsys.stdout.write('b')", [("", "a\nb")]),
    "deep recursion": (
        (
            "import sys\nsys.setrecursionlimit(10 ** 6)\ndef f(n): return 0 if n == 0 else 1 + f(n"
            " - 1)\nprint(f(100_000))"
        ),
        [("", "100000")],
    ),
    "deep recursion through a cache": (
        (
            "from functools import lru_cache\n@lru_cache(None)\n"
            "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20_000))"
        ),
        [("", "20000")],
    ),
    "names that nobody imported": (
        (
            "h = []\nheappush(h, int(input()))\nd: Dict[int, int] = defaultdict(int)\n"
            "print(h, d[0], inf, bisect_left([1], 1), math.gcd(4, 6))"
        ),
        [("3\n", "[3] 0 inf 0 2")],
    ),
    "streams that nobody imported": (
        "stdout.write(stdin.readline() + stdin.read())",
        [("1\n2", "1\n2")],
    ),
    "builtins as they are": (
        "print(pow(2, 10, 7), sum([1]), abs(-1), all([]))",
        [("", "2 1 1 True")],
    ),
    "dataclass and enum": (
        (
            "from dataclasses import dataclass\nfrom enum import Enum\nclass C(Enum):\n A ="
            " 1\n@dataclass\nclass P:\n x: int\nprint(P(2), C.A)"
        ),
        [("", "P(x=2) C.A")],
    ),
    "a metaclass and super": (
        (
            "class M(type):\n def __call__(c, *a): return super().__call__(*a)\n"
            "class A(metaclass=M): pass\nprint(type(A()).__name__)"
        ),
        [("", "A")],
    ),
    "exec and eval of its own": ("exec('x = 3')\nprint(eval('x + 1'))", [("", "4")]),
    "its own exceptions": (
        "class E(ValueError): pass\ntry: raise E('x')\nexcept ValueError as e: print(repr(e))",
        [("", "E('x')")],
    ),
    "reading to the end of input": (
        "while True:\n try: print(int(input()))\n except EOFError: break",
        [("1\n2", "1\n2")],
    ),
    "a file of its own": (
        "with open('notes.txt', 'w') as f: f.write('hi')\nprint(open('notes.txt').read())",
        [("", "hi")],
    ),
    "a pool of processes": (
        (
            "from multiprocessing import Pool\ndef f(x): return x * x\nif __name__ == '__main__':\n"
            " with Pool(2) as p: print(sum(p.map(f, range(10))))"
        ),
        [("", "285")],
    ),
    "a pool of threads": (
        (
            "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as p:\n"
            " print(sum(p.map(int, '123')))"
        ),
        [("", "6")],
    ),
    "a signal of its own": (
        (
            "import signal\nsignal.signal(signal.SIGALRM, lambda *a: print('ding'))\n"
            "signal.setitimer(signal.ITIMER_REAL, .01)\nsignal.pause()"
        ),
        [("", "ding")],
    ),
    "pickle of its own class": (
        "import pickle\nclass A: x = 5\nprint(pickle.loads(pickle.dumps(A())).x)",
        [("", "5")],
    ),
    "warnings on stderr": ("import sys\nprint('debug', file=sys.stderr)\nprint(1)", [("", "1")]),
    "random that is seeded": (
        "import random\nrandom.seed(1)\nprint(random.randint(1, 1))",
        [("", "1")],
    ),
    "an order of sets": ("print(list({'b', 'a', 'c'}) == list({'b', 'a', 'c'}))", [("", "True")]),
    "much input and output": (
        "print(input().count('7'))\nprint('8' * 10 ** 6)",
        [("7" * 3_000_000, "3000000\n" + "8" * 10**6)],
    ),
    "huge numbers": ("print(10 ** 20_000)", [("", "1" + "0" * 20_000)]),
    "unicode": ("print(input()[::-1])", [("日本\u2028é", "é\u2028本日")]),
    "blanks that don't matter": (
        "print('1 2 ')\nprint()\nprint(3, '   ')\nprint()",
        [("", "1 2\n\n3\n")],
    ),
    "numbers written otherwise": ("print('1.50', 2.0, '1e3')", [("", "1.5 2 1000")]),
    "no output where none is wanted": ("pass", [("", "")]),
    "numpy": ("import numpy as np\nprint(int(np.arange(5).sum()))", [("", "10")]),
    "several tests with state": (
        "seen = globals().get('seen', 0) + 1\nprint(seen, input())",
        [("a", "1 a"), ("b", "1 b")],
    ),
    "a stdout that only writes": (
        (
            "import sys, os\nclass W:\n def write(s, x): os.write(1, x.encode())\n"
            "sys.stdout = W()\nprint(5)"
        ),
        [("", "5")],
    ),
    "no stdout in the end": ("import sys\nprint(5)\nsys.stdout = None", [("", "5")]),
    "a stdout without its buffer": (
        "import sys, io\nprint(5)\no = io.TextIOWrapper(sys.stdout.detach())\nprint(6, file=o)",
        [("", "5\n6")],
    ),
    "a second file on stdout": (
        "out = open(1, 'w', closefd=False)\nprint(5, file=out)",
        [("", "5")],
    ),
    "os.fdopen": ("import os\nout = os.fdopen(1, 'w')\nout.write('5')", [("", "5")]),
    "output when objects go": (
        "import math\nclass A:\n def __del__(s): print(math.floor(5.5))\na = A()\nb = A()\nb.b = b",
        [("", "5\n5")],
    ),
    "output of C": ("import ctypes\nctypes.CDLL(None).printf(b'5\\n')", [("", "5")]),
    "a name and text of its file": (
        "import os\nprint(os.path.basename(__file__), len(open(__file__).read()))",
        [("", "Solution.py 71")],
    ),
    "processes that import its file": (
        (
            "from multiprocessing import get_context\ndef f(x): return x + 1\nif __name__ =="
            " '__main__':\n with get_context('spawn').Pool(2) as p: print(sum(p.map(f, [1, 2])))"
        ),
        [("", "5")],
    ),
    "a shell": (
        (
            "import os, subprocess as s\nprint(1, flush=True)\nos.system('echo"
            " 2')\nprint(s.run('echo $((1 + 2)) | cat', shell=True, capture_output=True,"
            " text=True).stdout)"
        ),
        [("", "1\n2\n3")],
    ),
    "asyncio with a process": (
        (
            "import asyncio\nasync def f():\n p = await asyncio.create_subprocess_shell('echo 5', "
            "stdout=-1)\n print((await p.communicate())[0].decode())\nasyncio.run(f())"
        ),
        [("", "5")],
    ),
    "sockets of its own": (
        "import socket\na, b = socket.socketpair()\na.send(b'5')\nprint(b.recv(1).decode())",
        [("", "5")],
    ),
    "reading a signal's action": (
        "import signal\nprint(signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)",
        [("", "True")],
    ),
    "fractions and decimals": (
        (
            "from fractions import Fraction as F\nfrom decimal import Decimal as D\n"
            "def f(x): return [F(x), D(x), F(5, 2), D('0.5'), {1: F(x)}]"
        ),
        [("5", '[5, 5, 2.5, 0.5, {"1": 5}]')],
        "f",
    ),
    "a value and no stdout": (
        "import sys\nsys.stdout = None\ndef f(x): return x",
        [("5", "5")],
        "f",
    ),
    "a value and words at exit": (
        "import atexit\natexit.register(lambda: print('x'))\ndef f(x): return x",
        [("5", "5")],
        "f",
    ),
    "class Solution": (
        "class Solution:\n def f(self, a: List[int], k: int) -> int: return sum(a) * k",
        [("[1, 2, 3]\n4", "24"), ("[]\n1", "0")],
        "f",
    ),
    "a bare function": ("def f(a, k): return sum(a) * k", [("[1, 2, 3]\n4", "24")], "f"),
    "a class that calls itself": (
        (
            "class Solution:\n def g(self, n): return n\n def f(self, n): return self.g(n) + 1\n"
            "print(Solution().f(1))"
        ),
        [("1", "2")],
        "f",
    ),
    "a guard under a function": (
        "def f(s): return s\nif __name__ == '__main__': print(f(input()))",
        [('"a"', '"a"')],
        "f",
    ),
    "tuples for lists": ("def f(n): return [(n, n), (n,)]", [("1", "[[1, 1], [1]]")], "f"),
    "a whole float": ("def f(n): return n / 1", [("2", "2")], "f"),
    "prints beside the value": ("def f(n):\n print('debug', n)\n return n", [("5", "5")], "f"),
    "numpy's numbers": (
        "import numpy as np\ndef f(n): return np.int64(n) + np.arange(2)",
        [("5", "[5, 6]")],
        "f",
    ),
    "a function that changes its argument": (
        "def f(a):\n a.sort()\n return a",
        [("[2, 1]", "[1, 2]")],
        "f",
    ),
    "a text with separators": ("def f(s): return s", [('"a\u2028b"', '"a\\u2028b"')], "f"),
    "none": ("def f(s): return None", [("1", "null")], "f"),
    "a decorator": (
        "from functools import cache\nclass Solution:\n @cache\n def f(self, n): return n",
        [("1", "1")],
        "f",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_every_honest_program_passes(name):
    if name == "deep recursion through a cache" and sys.version_info[:2] in ((3, 12), (3, 13)):
        pytest.skip("this Python limits recursion through C: see tasks.SHALLOW")
    code, pairs, *fn_name = HONEST[name]
    found = judge(code, [i for i, _ in pairs], [o for _, o in pairs], *fn_name)
    assert (
        found.passed
        and found.status == "passed"
        and found.n_passed == len(pairs)
        and found.feedback == ""
    ), found


def test_the_red_team_is_large_enough():
    assert len(HOSTILE) + len(HOSTILE_FUNCTIONS) >= 40 and len(HONEST) >= 30


def test_cpu_time_counts_not_the_clock():
    """While other programs take the cores, a program with 0.3 s of work passes a limit of 1 s; a
    sleeper has the clock.
    """
    work = "import time\nwhile time.process_time() < .3: pass\nprint(1)"
    busy = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
        for _ in range(2 * sandbox.CORES)
    ]
    try:
        assert judge(work, ["", ""], ["1", "1"], time_limit=1.0).passed
        assert judge("import time\ntime.sleep(.8)\nprint(1)", [""], ["1"], time_limit=0.4).passed
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_sleepers_get_their_time_once():
    """Each test sleeps for less than a test may last; with many tests that would hold a slot for
    minutes.
    """
    begin = time.monotonic()
    judgement = judge(
        "import time\ntime.sleep(.3)\nprint(1)", [""] * 40, ["1"] * 40, time_limit=0.2
    )
    assert judgement.status == "time_limit" and judgement.n_passed >= 1
    assert time.monotonic() - begin < 10


def test_many_tests_with_work_have_time_each():
    code = (
        "import time\nend = time.process_time() + .1\nwhile time.process_time() < end:"
        " pass\nprint(1)"
    )
    # all together they need the limit four times
    assert judge(code, [""] * 12, ["1"] * 12, time_limit=0.3).passed


def test_the_runner_outlives_the_signals_of_its_programs():
    code = "import os\nfor s in (2, 9, 15, 19): os.kill(1, s)\nprint(1)"
    assert judge(code, ["", ""], ["1", "1"]).passed


def test_time_ends_the_run_and_later_tests_count_as_failed():
    code = "n = int(input())\nwhile n == 2: pass\nprint(n)"
    found = judge(code, ["1", "2", "3"], ["1", "2", "3"], time_limit=0.3)
    assert (found.status, found.n_passed) == ("time_limit", 1)
    assert len(list(execute(code, ["1", "2", "3"], time_limit=0.3))) == 2


def test_no_more_programs_at_once_than_cores():
    code, n = "import time\ntime.sleep(.3)\nprint(1)", 3 * sandbox.CORES
    start = time.monotonic()
    threads = [threading.Thread(target=judge, args=(code, [""], ["1"])) for _ in range(n)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert time.monotonic() - start > 0.9


def test_the_job_holds_no_output(monkeypatch):
    sent = []
    dumps = sandbox.marshal.dumps
    monkeypatch.setattr(sandbox.marshal, "dumps", lambda job: sent.append(dumps(job)) or sent[-1])
    assert judge("print(int(input()) + 1000000)", ["4321"], ["1004321"]).passed
    assert len(sent) == 1 and b"4321" in sent[0] and b"1004321" not in sent[0]


def test_a_trainer_that_is_killed_leaves_nothing(outside):
    token = sandbox.ENVIRONMENT["RED_TEAM"]
    code = (
        f"from tasks import sandbox; sandbox.ENVIRONMENT['RED_TEAM'] = '{token}'; "
        "from tasks.code import judge; judge('while 1: pass', [''], ['1'])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not any(
        b"marshal" in p.read_bytes()
        for p in Path("/proc").glob("[0-9]*/cmdline")
        if p.exists() and token in environment(p.with_name("environ"))
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer.kill()
    trainer.wait()  # the fixture looks for what is left


@pytest.mark.parametrize("version, told", [((3, 11), ""), ((3, 12), "Python 3.12 fails programs")])
def test_a_python_that_limits_recursion_is_named(version, told, monkeypatch):
    monkeypatch.setattr(tasks, "sys", SimpleNamespace(version_info=(*version, 1)))
    monkeypatch.setattr(tasks, "sandbox_command", list)
    remark = tasks.need_sandbox(a_task("test"))
    assert remark.startswith(told) and bool(remark) == bool(told)


def a_task(split):
    """A task with programs in one split alone."""
    splits = {name: [SimpleNamespace(verifier="exact")] for name in ("train", "dev", "test")}
    splits[split].append(SimpleNamespace(verifier="code"))
    return SimpleNamespace(**splits)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_programs_in_any_split_need_a_sandbox(split, monkeypatch):
    """An evaluation verifies the answers of test alone."""
    asked, allowed = [], []
    monkeypatch.setattr(tasks, "sandbox_command", lambda: asked.append(1))
    monkeypatch.setattr(tasks, "allow_unsafe_exec", lambda: allowed.append(1))
    tasks.need_sandbox(a_task(split))
    assert asked == [1]
    tasks.need_sandbox(a_task(split), unsafe_exec=True)
    assert allowed == [1]
    tasks.need_sandbox(a_task(split), unsafe_exec=True, splits=["test"])
    assert len(allowed) == 1 + (split == "test")


def test_without_a_sandbox_only_on_request(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "ENVIRONMENT", {**sandbox.ENVIRONMENT, "PATH": "/nowhere"})
    monkeypatch.setattr(sandbox, "unsafe_exec", False)
    sandbox.sandbox_command.cache_clear()
    try:
        with pytest.raises(ValueError, match="apt install bubblewrap"):
            judge("print(1)", [""], ["1"])
        monkeypatch.setitem(sys.modules, "pyseccomp", None)
        with pytest.raises(
            ValueError, match="needs libseccomp: install it .apt install libseccomp2"
        ):
            sandbox.call_filter.__wrapped__()
        sandbox.allow_unsafe_exec()
        assert "WITHOUT a sandbox" in capsys.readouterr().err
        assert judge("print(int(input()) * 2)", ["1", "2"], ["2", "4"]).passed
        assert (
            judge("import os, time\nos.fork()\ntime.sleep(9)", [""], [""], time_limit=0.2).status
            == "time_limit"
        )
        assert judge("while True: pass", ["", ""], ["", ""], time_limit=0.2).status == "time_limit"
        assert judge("x = bytearray(1 << 30)", [""], [""], memory_mb=256).status == "runtime_error"
    finally:
        sandbox.sandbox_command.cache_clear()
