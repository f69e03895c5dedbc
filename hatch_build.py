"""Puts beside the package what installing it needs: the import hook, and in wheels the configs."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        root = Path(self.root)
        # site reads a .pth file only from the top of site-packages.
        hook = {str(root / "xtuner_ext.pth"): "xtuner_ext.pth"}
        if version == "editable":
            build_data["force_include_editable"].update(hook)
            return
        build_data["force_include"].update(hook)
        if (root / "projects").is_dir():
            build_data["force_include"][str(root / "projects")] = "xtuner_ext/projects"
