"""Options as flags of the command line, grouped by the room that declares them."""

import argparse
import difflib
import json
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser

# Flags of TRL and settings of verl, and what they are called here
ELSEWHERE = {
    "learning_rate": "--lr",
    "output_dir": "--out",
    "default_local_dir": "--out",
    "run_name": "--name",
    "experiment_name": "--name",
    "model_name_or_path": "--model",
    "num_generations": "--group_size",
    "n": "--group_size",
    "max_completion_length": "--max_completion",
    "max_response_length": "--max_completion",
    "max_prompt_length": "--max_prompt",
    "max_reprompt_len": "--max_reprompt",
    "report_to": "--log",
    "logger": "--log",
    "num_train_epochs": "--epochs",
    "total_epochs": "--epochs",
    "max_steps": "--steps",
    "total_training_steps": "--steps",
    "train_batch_size": "--batch_size",
    "per_device_train_batch_size": "--batch_size, which counts problems, and --micro_tokens",
    "gradient_accumulation_steps": "--micro_tokens, which changes no result",
    "ppo_max_token_len_per_gpu": "--micro_tokens",
    "ppo_mini_batch_size": "--mini_batch_size, which counts problems",
    "distillation_alpha": "--alpha",
    "distillation_topk": "--top_k",
    "teacher_update_rate": "--ema_rate",
    "adam_beta2": "--beta2",
    "use_vllm": "--sampler vllm",
    "vllm_gpu_memory_utilization": "--gpu_memory_utilization",
    "vllm_tensor_parallel_size": "--tensor_parallel",
    "tensor_model_parallel_size": "--tensor_parallel",
    "save_steps": "--save_every",
    "save_freq": "--save_every",
    "eval_steps": "--eval_every",
    "test_freq": "--eval_every",
    "dataset_name": "--task",
    "train_files": "--task",
    "resume_from_checkpoint": "--resume",
    "bf16": "--dtype bfloat16",
    "n_gpus_per_node": "--nproc",
}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag in one spelling, its default where there is one, and the text as written."""

    def _format_action_invocation(self, action):
        """Leaves out the spellings with hyphens, which HfArgumentParser takes too."""
        spellings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if len(spellings) == len(action.option_strings):
            return super()._format_action_invocation(action)
        shown = argparse.Action(spellings, action.dest, nargs=action.nargs, metavar=action.metavar)
        shown.choices = action.choices
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action):
        if action.const is False:  # --no_X, which HfArgumentParser explains as it does --X
            return f"switches --{action.dest} off"
        if action.default in ("", None):
            return action.help
        return super()._get_help_string(action)


class Flags(HfArgumentParser):
    """The fields of a Config as flags, in groups: the class that declares a field is its group.

    `within`, which argparse does not know, is for check_numbers.
    """

    def __init__(self, config, **kwargs):
        self.titles, self.groups = titles(config), {}
        super().__init__(config, formatter_class=Help, allow_abbrev=False, **kwargs)
        self.add_argument(  # given_flags has read it by then
            "--config",
            default=argparse.SUPPRESS,
            help="a run's config.json, or a YAML file of flags, to take flags from; flags on the"
            " command line override them",
        )
        order = [title_of(base) for base in config.__mro__]
        self._action_groups.sort(
            key=lambda group: group.title in order and order.index(group.title)
        )

    def add_argument(self, *names, within="", **kwargs):
        title = self.titles.get(kwargs.get("dest") or names[0].lstrip("-"))
        if title is None:  # --help
            return super().add_argument(*names, **kwargs)
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title].add_argument(*names, **kwargs)

    def error(self, message):
        """Ends the program; of unknown flags it says which of ours may be meant."""
        kind, _, rest = message.partition("unrecognized arguments: ")
        if not kind:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            meant = [advice(word, known) for word in rest.split()]
            message = "; ".join([message, *filter(None, meant)])
        super().error(message)


def advice(word, known) -> str:
    """Says which flag a word that is none may mean, or "".

    word: such as --learning_rate, or actor_rollout_ref.rollout.n=8 as verl has it. known: flags.
    """
    name = word.partition("=")[0]
    if not name.startswith("-") and "=" not in word:  # the value of a flag
        return ""
    stem = name.lstrip("-+").split(".")[-1].replace("-", "_")
    near = difflib.get_close_matches(f"--{stem}", known, n=1, cutoff=0.75)
    ours = ELSEWHERE.get(stem) or (near[0] if near else "")
    return f"{name} may be {ours} here" if ours else ""


def given_flags(argv=None) -> list[str]:
    """Returns the flags of the command line, with those of a --config FILE before them.

    Raises ValueError, in one sentence, if the file can't be read, or if there are two.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    given, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if len(given.config) > 1:
        raise ValueError(f"--config takes one file, not {' and '.join(given.config)}")
    return [flag for path in given.config for flag in flags_of(path)] + rest


def flags_of(path) -> list[str]:
    """Returns the flags of a run's config.json or of a YAML file.

    --name and --resume in a run's config.json are of that run alone, and are left out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"--config {path} can't be read: {said}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} is no table of flags and values")
    flags = []
    for name, value in values.items():
        if isinstance(value, (dict, list)):
            raise ValueError(f"--config {path}: {name} must be one value, as behind its flag")
        if name == "config":
            raise ValueError(f"--config {path} names another file; put its flags into this one")
        is_of_that_run = path.endswith(".json") and name in ("name", "resume")
        if value is not None and not is_of_that_run:
            flags.append(f"--{name}={value}")
    return flags


def title_of(config) -> str:
    """The first line of a class's docstring, or the name of its file."""
    text = config.__doc__ or ""
    if not text or text.startswith(f"{config.__name__}("):  # which dataclass makes of none
        return config.__module__.split(".")[-1]
    return text.splitlines()[0].rstrip(".")


def titles(config) -> dict[str, str]:
    """{field: the title of the class that first declares it}"""
    found = {}
    for base in reversed(config.__mro__):
        for name in base.__dict__.get("__annotations__", {}):
            found.setdefault(name, title_of(base))
    return found
