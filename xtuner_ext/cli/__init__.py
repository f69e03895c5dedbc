"""The command line, and where its configs are."""

import os
from pathlib import Path


def configs_dir():
    """Returns the folder of our configs.

    Returns:
        Path: `xtuner_ext/projects` of an installed wheel, else `projects` beside the package in
        a checkout.
    """
    package = Path(__file__).resolve().parents[1]
    packaged = package / "projects"
    return packaged if packaged.is_dir() else package.parent / "projects"


def config_names():
    """Maps the name of every config we ship to its file.

    Names are paths below the configs folder without suffix, e.g. `mmmamba/digits/stage1`. Files
    and folders that start with `_` or `.` are parts of configs, not configs.

    Returns:
        dict[str, str]: Name to absolute path.
    """
    root = configs_dir()
    names = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(("_", ".")))
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(("_", ".")):
                path = Path(folder, name)
                names[path.relative_to(root).with_suffix("").as_posix()] = str(path)
    return names
