"""Finding a config, and overriding its keys from the command line."""

import ast
import difflib
import importlib.util
from pathlib import Path

from xtuner_ext.cli import config_names, configs_dir
from xtuner_ext.errors import UserError

# Keys that the runner or the train tool reads, so that setting one works even in a config that
# leaves it out or also uses it as a variable.
RUNNER_KEYS = frozenset(
    "model work_dir train_dataloader val_dataloader test_dataloader train_cfg val_cfg test_cfg "
    "auto_scale_lr optim_wrapper param_scheduler val_evaluator test_evaluator default_hooks "
    "custom_hooks data_preprocessor load_from resume launcher env_cfg log_processor log_level "
    "visualizer default_scope randomness experiment_name total_batch_size save_steps".split()
)
SETTABLE_WHEN_ABSENT = frozenset({"work_dir", "load_from", "resume"})


def find_config(name):
    """Returns the absolute path of a config.

    Args:
        name (str): A path relative to the current directory or to the one that holds `projects/`,
            or a name that `xtuner list-cfg` prints.

    Raises:
        UserError: If there is no such config; it names the closest ones.
    """
    for candidate in (Path(name), configs_dir().parent / name):
        if candidate.is_file():
            return str(candidate.resolve())
    known = config_names()
    stem = name.removesuffix(".py").removeprefix("projects/")
    if stem in known:
        return known[stem]
    if importlib.util.find_spec("xtuner") is not None:
        from xtuner.configs import cfgs_name_path

        known = {**cfgs_name_path, **known}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(stem, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; `xtuner list-cfg` prints the known names"
    raise UserError(f"config {name} is neither a file nor the name of a config{hint}")


def load_config(path, options=()):
    """Reads a config and applies overrides to it, each of which must name an existing key.

    Args:
        path (str): The config file.
        options (Sequence[str]): Overrides as they stand after `--cfg-options`, e.g. `train_cfg.max_iters=10`.

    Returns:
        mmengine.config.Config: The config with the overrides applied.

    Raises:
        UserError: If the file is not valid Python, or an override names no key of it or one that
            would have no effect.
    """
    from mmengine.config import Config

    try:
        config = Config.fromfile(path)
    except SyntaxError as error:
        raise UserError(f"config {path}, line {error.lineno}: {error.msg}") from error
    overrides = parse_options(options)
    check_options(config, overrides, path)
    if overrides:
        config.merge_from_dict(overrides)
    return config


def parse_options(options):
    """Turns `key=value` strings into a dict, reading values as MMEngine does."""
    from mmengine.config import DictAction

    overrides = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise UserError(f"--cfg-options {option} was given, key=value is expected")
        overrides[key] = DictAction._parse_iterable(value)
    return overrides


def check_options(config, overrides, path):
    """Raises UserError unless every override changes a key that the config holds and uses.

    Args:
        config (mmengine.config.Config): The config as it stands in the file.
        overrides (dict[str, Any]): Dotted key to value; a part may be the index of a list.
        path (str): The config file, for the message and to see how its variables are used.
    """
    tree = config._cfg_dict
    variables = None
    for key in overrides:
        first, _, rest = key.partition(".")
        if not _holds(tree, key.split(".")) and key not in SETTABLE_WHEN_ABSENT:
            close = _closest(key, [".".join(parts) for parts in _paths(tree)])
            hint = f"; the nearest keys are {', '.join(close)}" if close else ""
            raise UserError(f"--cfg-options {key}: {path} has no such key{hint}")
        if first in RUNNER_KEYS:
            continue
        if variables is None:
            variables = _variables_read_in(Path(path))
        if first in variables:
            uses = _uses(tree, first, rest)
            hint = " and ".join(uses) or "the keys that it is used in"
            raise UserError(
                f"--cfg-options {key}: {first} is a variable of {path} whose value is already "
                f"part of other keys, so this would not change them; set {hint} instead"
            )


def _children(node):
    # dict's own methods, since those of ConfigDict import the objects that a lazy config names.
    if isinstance(node, dict):
        return [(str(key), dict.__getitem__(node, key)) for key in dict.keys(node)]
    if isinstance(node, (list, tuple)):
        return [(str(index), value) for index, value in enumerate(node)]
    return []


def _holds(node, parts):
    for part in parts:
        children = dict(_children(node))
        if part not in children:
            return False
        node = children[part]
    return True


def _paths(node, prefix=()):
    for key, value in _children(node):
        yield (*prefix, key)
        yield from _paths(value, (*prefix, key))


def _value(node, parts):
    for part in parts:
        node = dict(_children(node))[part]
    return node


def _closest(key, paths):
    leaf = key.rpartition(".")[2]
    same_leaf = [path for path in paths if path.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(key, paths, n=3)
    return list(dict.fromkeys(same_leaf[:3] + close))[:3]


def _uses(tree, variable, rest):
    """Finds the keys elsewhere in the config that hold the variable's value under its own or a like name."""
    value = _value(tree, [variable])
    tail = [rest] if rest else []
    return [
        ".".join([*parts, *tail])
        for parts in _paths(tree)
        if len(parts) > 1
        and parts[0] != variable
        and _equal(_value(tree, parts), value)
        and (parts[-1] == variable or not isinstance(value, (bool, int, type(None))))
    ][:4]


def _equal(left, right):
    return type(left) is type(right) and repr(left) == repr(right)


def _variables_read_in(path):
    """Collects the names that a Python config, or a config it is based on, reads after assigning them."""
    if path.suffix != ".py":
        return frozenset()
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.level and node.module:
            base = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            if base.is_file():
                names |= _variables_read_in(base)
    return frozenset(names)
