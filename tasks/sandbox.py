"""Runs programs that nobody has read: under bubblewrap, one sandbox a program, one process a test.

    execute(code, inputs, ...)  -> an Outcome for each input, in order

Expected outputs are no argument of anything in this file: they stay in the caller's process, which
compares. The sandbox returns bytes of bounded number, never unpickled, never evaluated. So a
program can lie about everything except the answer it has to print.

The walls, from the outside in:
- bubblewrap: own user, pid, net, ipc, uts and cgroup namespaces, no further user namespaces, no
  capabilities, no new privileges, an empty environment. /usr and the interpreter are read-only.
  /tmp, /dev/shm and a place for the tests' streams are private and bounded, and nothing else can be
  written. If we are root, the user `nobody` makes the sandbox, since root's processes know no limit
  of their number. A mount namespace shows him the interpreter, which may lie in root's home.
- `call_filter`: seccomp on every process inside. It refuses kernel keys, since any namespace
  inherits the session's keyring. It refuses SysV memory and memfd, which belong to no process, so
  that no limit counts them. It refuses sockets other than local and IP ones, since vsock knows no
  network namespace. It refuses tracing, io_uring, bpf, perf and mounts. Nobody may ignore SIGCHLD:
  the CPU time of children that the kernel reaps is counted nowhere.
- `runner`, process 1 of the pid namespace: the kernel drops every signal that a process inside
  sends to it. It is not dumpable, so that its memory and descriptors are closed to processes of the
  same user. When it goes, all go.
- Each test is a fork of it with limits of its own: CPU time of all its processes together, memory,
  number of processes, file and output size. A wall limit four times as long acts against sleepers,
  who do not get it anew for each test. When its first process ends, all that it left behind is
  killed before the output is read.

Not walled off: bugs of the kernel in the calls that are left, and the buffers of sockets and pipes,
which belong to no process. Programs that handle SIGCHLD themselves fail (multiprocessing's
forkserver, `wait` in a shell). Files in /tmp live as long as the program's sandbox, so that a test
can see those of an earlier test.
"""

import builtins
import contextlib
import errno
import functools
import json
import marshal
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

import numpy

OUTPUT = 16 << 20  # bytes that a test may write into any one file, its output among them
DISK = 64 << 20  # bytes in /tmp, and again in /dev/shm, and of a test's input
PROCESSES = 64  # of one test, threads counted
WALL = 4.0  # the wall limit in units of the CPU limit: a loaded machine must not change a verdict
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# the ranks of one machine share them
CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
UNPROTECTED = """\
Running generated code WITHOUT a sandbox. It gets a fresh process with limits on CPU time, memory,
file size and processes, and nothing else: it can read and write all that you can, use the
network, signal your processes and leave some behind. Install the sandbox (apt install bubblewrap
libseccomp2), or do this where nothing can be lost."""
# What no contest program needs of the kernel. A name that the library does not know on this machine
# is passed over.
REFUSED = """
add_key keyctl request_key shmget shmat semget msgget mq_open memfd_create memfd_secret
io_uring_setup io_uring_enter io_uring_register userfaultfd bpf perf_event_open ptrace
process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp unshare setns mount umount2
pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr
name_to_handle_at open_by_handle_at fanotify_init quotactl quotactl_fd acct swapon swapoff syslog
init_module finit_module delete_module kexec_load kexec_file_load reboot settimeofday
clock_settime clock_adjtime adjtimex iopl ioperm modify_ldt vmsplice move_pages migrate_pages
lookup_dcookie vhangup nfsservctl
""".split()
# The arguments of bubblewrap: the namespaces and what they show, then the writable places.
WALLS = """
--unshare-all --unshare-user --disable-userns --uid 65534 --gid 65534 --cap-drop ALL
--new-session --die-with-parent --as-pid-1 --hostname sandbox
--ro-bind /usr /usr --ro-bind-try /lib /lib --ro-bind-try /lib64 /lib64 --ro-bind-try /bin /bin
--proc /proc
"""
PLACES = f"""
--dev /dev --size {DISK} --tmpfs /dev/shm --size {DISK} --tmpfs /tmp
--size {DISK + 2 * OUTPUT} --tmpfs /streams
"""
START = (
    "import marshal, sys; code, job = marshal.load(sys.stdin.buffer); type(lambda: 0)(code,"
    " globals())(*job)"
)
unsafe_exec = False
slots = threading.BoundedSemaphore(CORES)


class Outcome(NamedTuple):
    """Holds the result of a test."""

    status: str  # ran, runtime_error or time_limit
    output: bytes  # stdout, or the returned value as JSON
    error: str  # for people


def runner(
    code,
    inputs,
    fn_name,
    time_limit,
    wall_limit,
    memory_limit,
    output_limit,
    processes,
    wanted,
    site,
):
    """Runs inside, as process 1, on arguments of its own: its code object is what is sent in.
    Writes results to fd 1.
    """
    import _ctypes
    import atexit
    import builtins
    import gc
    import marshal
    import os
    import select
    import sys
    import time

    # these two and _ctypes for their C parts alone: importing the public modules json, signal and
    # ctypes takes longer than all else here
    from _json import encode_basestring_ascii, make_encoder
    from _signal import SIG_IGN, signal
    from resource import (
        RLIMIT_AS,
        RLIMIT_CORE,
        RLIMIT_CPU,
        RLIMIT_FSIZE,
        RLIMIT_NOFILE,
        RLIMIT_NPROC,
        RLIMIT_STACK,
        getrlimit,
        setrlimit,
    )

    def c_call(name, *arguments):
        return _ctypes.call_cdeclfunction(_ctypes.dlsym(_ctypes.dlopen(None, 0), name), arguments)

    # PR_SET_DUMPABLE 0: no other process may trace us or open what is ours in /proc
    c_call("prctl", 4, 0, 0, 0, 0)
    # SIGINT, the one signal Python handles: all others a process 1 never gets from inside
    signal(2, SIG_IGN)
    # else there is no pid namespace, and more than our children to be seen and killed
    alone = os.getpid() == 1
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")

    def send(data):
        while data:
            data = data[os.write(results, data) :]

    def usage(child):
        """CPU seconds and resident bytes of the test's processes together (without a namespace: of
        its first one).

        Pages that processes share are counted once, which takes longer, so only where it can
        matter.
        """
        cpu, resident = 0, {}
        for pid in (
            [p for p in os.listdir("/proc") if p.isdigit() and p != "1"] if alone else [str(child)]
        ):
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:  # it has just ended
                continue
            cpu += sum(map(int, fields[11:15])) / ticks
            resident[pid] = int(fields[21]) * page
        if len(resident) > 1 and sum(resident.values()) > memory_limit:
            for pid in resident:
                try:
                    with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                        resident[pid] = 1024 * int(file.read().partition(b"\nPss:")[2].split()[0])
                except PermissionError:  # it has made itself unreadable: all of it counts
                    pass
                except (OSError, IndexError):  # it has just ended
                    resident[pid] = 0
        return cpu, sum(resident.values())

    def plain(value):
        """What JSON does not know: numpy's numbers and arrays, fractions and decimals are as good
        as the numbers they equal, other things their repr.
        """
        if hasattr(value, "tolist"):
            return value.tolist()
        for kind in (int, float):
            try:
                if (number := kind(value)) == value:
                    return number
            except (TypeError, ValueError, OverflowError):
                pass
        return repr(value)

    def call(namespace, arguments):
        """Calls the named function, a method of Solution or a bare one. Its value, as JSON, becomes
        the output.
        """
        owner = namespace.get("Solution")
        function = getattr(owner(), fn_name) if hasattr(owner, fn_name) else namespace[fn_name]
        encode = make_encoder(
            None, plain, encode_basestring_ascii, None, ": ", ", ", False, False, True
        )
        answer = "".join(encode(function(*arguments), 0)).encode()
        os.ftruncate(1, 0)  # what it printed is no answer, and what it left in a buffer never comes
        os.lseek(1, 0, 0)
        while answer:
            answer = answer[os.write(1, answer) :]

    def explain(error):
        """Type, message and the last three lines of the program itself that led there."""
        frames, step = [], error.__traceback__
        while step:
            if step.tb_frame.f_code.co_filename == "Solution.py":
                frames.append((step.tb_lineno, step.tb_frame.f_code.co_name))
            step = step.tb_next
        if isinstance(error, SyntaxError) and error.lineno:
            frames.append((error.lineno, "<module>"))
        lines = code.split("\n")
        where = "".join(
            f"\n  {''.join(lines[n - 1 : n]).strip()}\nLine {n} in {name} (Solution.py)"
            for n, name in frames[-3:]
        )
        os.ftruncate(2, 0)
        os.lseek(2, 0, 0)
        os.write(2, f"{type(error).__name__}: {error}{where}".encode("utf-8", "replace")[:4000])

    def program(given):
        """The forked child: limits, then the program, run as Python would. Gives the exit code."""
        hard = getrlimit(RLIMIT_STACK)[1]
        # for deep recursion through C
        setrlimit(RLIMIT_STACK, (120 << 20 if hard < 0 else min(120 << 20, hard), hard))
        for kind, limit in (
            (RLIMIT_AS, memory_limit),
            (RLIMIT_CPU, int(time_limit) + 2),
            (RLIMIT_FSIZE, output_limit),
            (RLIMIT_NPROC, processes),
            (RLIMIT_NOFILE, 64),
            (RLIMIT_CORE, 0),
        ):
            setrlimit(kind, (limit, limit))
        sys.argv[:] = ["Solution.py"]
        sys.setrecursionlimit(50_000)
        sys.set_int_max_str_digits(50_000)
        module = type(sys)(main)
        sys.modules[main] = module
        module.__dict__.update(prelude, __file__=path)
        try:
            parsed = (
                marshal.loads(compiled)
                if compiled
                else compile(code, "Solution.py", "exec", dont_inherit=True)
            )
            if given is None:
                os.write(1, marshal.dumps(parsed))
                return 0
            try:
                exec(parsed, module.__dict__)
                if fn_name:
                    call(module.__dict__, given)
                    return 0
            except SystemExit:
                if fn_name:
                    raise
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()
            atexit._run_exitfuncs()
            flush()
            # as Python ends: objects that say something when they go, files nobody closed
            sys.modules.pop(main, None)
            module = None
            gc.collect()
            flush()
            c_call("fflush", None)
            return 0
        except BaseException as error:
            explain(error)
            return 1

    def unnamed():
        """A file in memory without a name. Inside, it has a place of limited size, since the filter
        forbids a memfd.
        """
        return (
            os.open("/streams", os.O_TMPFILE | os.O_RDWR, 0o600)
            if alone
            else os.memfd_create("unnamed")
        )

    def flush():
        """Our stdout, and what the program may have put in its place, if that can be flushed."""
        for stream in (sys.stdout, stdout):
            try:
                if not getattr(stream, "closed", False) and hasattr(stream, "flush"):
                    stream.flush()
            except ValueError:  # its buffer was detached, and is another's now
                pass

    def attempt(given):
        """One test: status, output and error text. Its streams are files, so no pipe can fill or
        stay open.

        Given nothing, the program is compiled and the code is the output: parsing can take a
        hostile text's time, too. The clock's limit holds for each test, and for all so far beyond
        the time that their CPU seconds explain.
        """
        nonlocal spent, waited
        files = [unnamed(), unnamed(), unnamed()]
        os.write(files[0], given if isinstance(given, bytes) else b"")
        os.lseek(files[0], 0, 0)
        child = os.fork()
        if child == 0:
            exit_code = 1
            try:
                c_call("prctl", 4, 1, 0, 0, 0)  # its pages may be counted
                os.setsid()
                for target, fd in enumerate(files):
                    os.dup2(fd, target)
                os.closerange(3, 64)
                exit_code = program(given)
            finally:
                os._exit(exit_code)
        pidfd, start, status, error = os.pidfd_open(child), time.monotonic(), "ran", b""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while not poll.poll(50):
            cpu, memory = usage(child)
            wall = time.monotonic() - start
            if (
                cpu > time_limit
                or wall > wall_limit
                or waited + wall > wall_limit * (1 + (spent + cpu) / time_limit)
            ):
                status = "time_limit"
                break
            if memory > memory_limit:
                status, error = (
                    "runtime_error",
                    b"MemoryError: its processes together used too much memory",
                )
                break
        for victim in (
            (-1,) if alone else (-child, child)
        ):  # -1: all but us, at once, so that no fork escapes
            try:
                os.kill(victim, 9)
            except ProcessLookupError:
                pass
        cpu, ended = 0.0, {}
        try:
            while True:
                pid, wait_status, used = os.wait4(-1, 0)
                ended[pid] = wait_status
                cpu += used.ru_utime + used.ru_stime
        except ChildProcessError:
            pass
        spent, waited = spent + cpu, waited + time.monotonic() - start
        output, said = (
            os.pread(fd, min(os.fstat(fd).st_size, output_limit), 0) for fd in files[1:]
        )
        for fd in (*files, pidfd):
            os.close(fd)
        exit_code = os.waitstatus_to_exitcode(ended[child])
        if cpu > time_limit or status == "time_limit":
            return "time_limit", b"", b""
        if exit_code and status == "ran":
            status, error = "runtime_error", said or b"It ended with exit code %d" % exit_code
        return status, output, error[:4000]

    spent = waited = 0.0  # by the tests so far, CPU seconds and seconds
    compiled, results, main, path = (
        b"",
        os.dup(1),
        "solution" if fn_name else "__main__",
        os.path.abspath("Solution.py"),
    )
    with open(path, "wb") as file:  # for what reads or imports its own file
        file.write(code.encode("utf-8", "replace"))
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        # a file, as the test's own will be, or Python would take it for a pipe
        os.dup2(unnamed(), fd)
        stream = open(
            fd,
            mode,
            encoding="utf-8",
            errors="backslashreplace" if fd == 2 else "strict",
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.path.append(site)
    prelude = {}
    for name, module, attribute in wanted:
        try:
            loaded = __import__(module)
        except (
            ImportError
        ):  # a package this interpreter has not got; the program will be told so itself
            continue
        if name:
            prelude[name] = getattr(loaded, attribute) if attribute else loaded
    builtins.exit = builtins.quit = sys.exit
    stdout = sys.stdout
    gc.freeze()  # what is here already need not be walked again when a test ends
    send(b"ready")
    # where that fails there is no output, and each test says why by itself
    status, compiled, error = attempt(None)
    for given in inputs:
        status, output, error = attempt(given)
        send(b"%-16s%16d%16d" % (status.encode(), len(output), len(error)) + output + error)
        if status == "time_limit":
            break


@functools.cache
def call_filter() -> bytes:
    """Makes the filter of the system calls that no program may make, as BPF for bubblewrap.

    See REFUSED.
    Raises ValueError if it can't be made.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError) as error:  # the second where it finds no library
        raise ValueError(
            "generated code runs only in a sandbox, which needs libseccomp: install it (apt install"
            " libseccomp2; pip install pyseccomp), or give --unsafe_exec to run code without one"
        ) from error
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    refuse, no_family = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.EAFNOSUPPORT)
    # 32-bit calls have other numbers
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    for name in REFUSED:
        try:
            rules.add_rule(refuse, name)
        except OSError:
            pass
    for call in ("socket", "socketpair"):
        for family in {*range(socket.AF_INET6)} - {socket.AF_UNIX, socket.AF_INET}:
            rules.add_rule(no_family, call, seccomp.Arg(0, seccomp.EQ, family))
        rules.add_rule(no_family, call, seccomp.Arg(0, seccomp.GT, socket.AF_INET6))
    # The kernel reads the low half of the number alone, so that is what is compared. Reading an
    # action sets no new one.
    rules.add_rule(
        refuse,
        "rt_sigaction",
        seccomp.Arg(0, seccomp.MASKED_EQ, 0xFFFFFFFF, signal.SIGCHLD),
        seccomp.Arg(1, seccomp.NE, 0),
    )
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@contextlib.contextmanager
def filtered(command):
    """Yields (command, descriptors to pass) of a sandbox with call_filter.

    The filter has a descriptor of its own, since reading moves it.
    """
    with os.fdopen(os.memfd_create("filter"), "w+b", buffering=0) as file:
        file.write(call_filter())
        file.seek(0)
        yield [*command[:-1], "--seccomp", str(file.fileno()), command[-1]], (file.fileno(),)


@functools.cache
def sandbox_command() -> list[str]:
    """Returns the command in front of the interpreter's own arguments, but for the filter.

    `filtered` adds the filter.
    Raises ValueError, in a sentence, if there is no sandbox.
    """
    tools = ["bwrap"] if os.getuid() else ["bwrap", "nsenter"]
    for tool in tools:
        if not shutil.which(tool, path=ENVIRONMENT["PATH"]):
            raise ValueError(
                f"generated code runs only in a sandbox, which needs {tool}: install it (apt"
                " install bubblewrap util-linux), or give --unsafe_exec to run code without one"
            )
    call_filter()
    base, site = sys.base_prefix, site_packages()
    outer = []
    if os.getuid() == 0:
        outer = enter_as_nobody(base, site)
        base, site = "/mnt/base", "/mnt/site"
    command = [*outer, "bwrap", *WALLS.split()]
    # The names of the session's keys, which the filter does not keep from being read.
    for name in ("/proc/keys", "/proc/key-users"):
        if os.path.exists(name):
            command += ["--ro-bind", "/dev/null", name]
    command += PLACES.split()
    command += ["--ro-bind", base, sys.base_prefix, "--ro-bind", site, "/site", "--chdir", "/tmp"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    command += [os.path.realpath(sys._base_executable)]
    with filtered(command) as (whole, passed):
        trial = subprocess.run(
            [*whole, "-S", "-c", "print(1)"],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            pass_fds=passed,
        )
    if trial.stdout != "1\n":
        raise ValueError(
            "bubblewrap is installed but makes no sandbox here (it has to be 0.8 or later, with"
            f" user namespaces allowed); it says: {trial.stderr.strip()}"
        )
    return command


def enter_as_nobody(base, site) -> list[str]:
    """Makes a mount namespace that shows two folders as /mnt/base and /mnt/site.

    Returns the command that enters it as the user `nobody`. The namespace lives as long as our
    descriptor of it.
    Raises ValueError if bubblewrap can't be used.
    """
    command = "bwrap --dev-bind / / --tmpfs /mnt".split()
    command += ["--ro-bind", base, "/mnt/base", "--ro-bind", site, "/mnt/site"]
    command += ["/bin/sh", "-c", "echo $$; read wait"]
    pipe = subprocess.PIPE
    view = subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    )
    pid = view.stdout.readline().strip()
    enter = []
    if pid:
        mounts = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        enter = ["nsenter", f"--mount=/proc/{os.getpid()}/fd/{mounts}"]
        enter += "--setuid 65534 --setgid 65534".split()
    why = view.communicate()[1].strip()
    if why:
        raise ValueError(f"bubblewrap is installed but can't be used here: {why}")
    return enter


def site_packages() -> str:
    """Returns the folder of installed packages that programs may import: that of numpy."""
    return os.path.dirname(os.path.dirname(numpy.__file__))


def allow_unsafe_exec():
    """Lets generated code run if there is no sandbox (--unsafe_exec), and prints a warning."""
    global unsafe_exec
    unsafe_exec = True
    try:
        sandbox_command()
    except ValueError as error:
        print(f"{error}\n{UNPROTECTED}", file=sys.stderr)


@functools.cache
def prelude() -> dict:
    """Returns the names that the official harness imports before a program runs.

    It is {name: (module, attribute or None)}. Later modules win, builtins win over all modules but
    typing, and modules win over their contents.
    """
    modules = (
        "string re datetime collections heapq bisect copy math random statistics itertools"
        " functools operator io sys json typing"
    ).split()
    table = {}
    for module in modules:
        loaded = __import__(module)
        public = getattr(loaded, "__all__", [n for n in vars(loaded) if not n.startswith("_")])
        table |= {n: (module, n) for n in public if module == "typing" or not hasattr(builtins, n)}
    return table | {module: (module, None) for module in modules}


def execute(code, inputs, fn_name=None, time_limit=6.0, memory_mb=1024):
    """Runs a program on each input; yields an Outcome for each.

    A test that runs out of time ends the program's run. No more programs run at once than there are
    cores. fn_name: None for a program that reads stdin and prints; else the function (a method of
    Solution, or a bare one) that is called with the JSON values on the lines of the input.
    time_limit: CPU seconds a test. WALL times as much may pass on the clock in a test, and in all
    tests beside WALL times the CPU seconds they used. memory_mb: MiB of address space of each
    process, and of resident memory of all together.
    Raises ValueError if there is no sandbox, for a line that is no JSON, and for an input of more
    than DISK.
    """
    arguments = [arguments_of(text, fn_name) for text in inputs]
    site = "/site"
    try:
        sandbox = filtered(sandbox_command())
    except ValueError:
        if not unsafe_exec:
            raise
        site = site_packages()
        sandbox = contextlib.nullcontext(([os.path.realpath(sys._base_executable)], ()))
    limits = (time_limit, WALL * time_limit, memory_mb << 20, OUTPUT, PROCESSES)
    job = marshal.dumps(
        (runner.__code__, (code, arguments, fn_name, *limits, modules_of(code), site))
    )
    pipe = subprocess.PIPE
    with (
        slots,
        tempfile.TemporaryDirectory() as scratch,
        sandbox as (command, passed),
        subprocess.Popen(
            [*command, "-S", "-s", "-P", "-X", "utf8", "-c", START],
            env=ENVIRONMENT,
            cwd=scratch,
            start_new_session=True,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            bufsize=0,
            pass_fds=passed,
        ) as process,
    ):
        try:
            # the runner has its own, shorter limit
            yield from outcomes(process, job, len(arguments), WALL * time_limit + 60)
        except TimeoutError:  # a program can starve the runner of CPU time
            yield Outcome("time_limit", b"", "")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def arguments_of(text, fn_name):
    """Returns an input as the runner takes it: the values for a function, or bytes for stdin.

    Raises ValueError if a line is no JSON, or if there are more bytes than DISK.
    """
    if fn_name:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    data = text.encode("utf-8", "replace")
    if len(data) > DISK:
        raise ValueError(f"an input of {len(data)} bytes is too large: the sandbox takes {DISK}")
    return data


def modules_of(code) -> list[tuple]:
    """Returns what the runner imports for a program: (name, module, attribute or None).

    It is what the program names of the prelude, and modules that are imported once, not in each
    test.
    """
    words = set(re.findall(r"\w+", code))
    slow = {"numpy", "sortedcontainers", "decimal", "fractions", "dataclasses"}
    wanted = [(name, *prelude()[name]) for name in words & prelude().keys()]
    return wanted + [("", name, None) for name in words & slow]


def outcomes(process, job, tests, patience):
    """Sends a job to the runner; yields an Outcome for each test, until the runner ends.

    patience: seconds to wait for the runner.
    Raises ValueError if it does not start, and TimeoutError if it says nothing for so long.
    """
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)

    def receive(n):
        """Returns n bytes, or fewer if the runner has ended."""
        data = bytearray()
        while len(data) < n:
            if not poll.poll(1000 * patience):
                raise TimeoutError
            part = process.stdout.read(min(n - len(data), 1 << 20))
            if not part:
                break
            data += part
        return bytes(data)

    try:
        with process.stdin:
            view = memoryview(job)
            while view:
                view = view[process.stdin.write(view) :]
    except BrokenPipeError:
        pass  # it has not started; the next lines say why
    if receive(5) != b"ready":
        why = process.stderr.read().decode(errors="replace").strip()
        raise ValueError(f"the sandbox did not start: {why}")
    for _ in range(tests):
        head = receive(48)
        if len(head) < 48:
            return  # the runner is gone, or has stopped after a test that ran out of time
        status, size, length = head.split()
        output = receive(int(size))
        error = receive(int(length)).decode(errors="replace")
        yield Outcome(status.decode(), output, error)
