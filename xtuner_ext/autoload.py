"""Repairs XTuner and what it stands on at the moment each module is imported.

`xtuner_ext.pth` runs `install` at every Python start of the environment, so the stock
`xtuner` command and the processes it starts are repaired too. `install` puts one finder on
`sys.meta_path` and imports nothing; the repairs themselves live in `xtuner_ext.compat`, which
is imported when the first module of the table is. `XTUNER_EXT=0` switches everything off.
"""

import os
import sys

# Module -> functions of `xtuner_ext.compat`, called with the module right after its own code ran,
# which is before any `from module import name` of another module can see it.
POST_IMPORT = {
    "torch.cpu": ("add_cpu_bf16_query",),
    "torchvision.extension": ("define_missing_torchvision_ops",),
    "bitsandbytes.nn.modules": ("keep_four_bits_differentiable",),
    "mmengine.utils.package_utils": ("find_packages_without_pkg_resources",),
    "mmengine.fileio.backends.local_backend": ("write_files_atomically",),
    "mmengine.dist.utils": ("init_dist_without_cuda",),
    "mmengine.model.wrappers.distributed": ("wrap_cpu_models_without_device_ids", "look_for_unused_llava_layers"),
    "mmengine.optim.optimizer.amp_optimizer_wrapper": ("train_mixed_on_cpu",),
    "mmengine.optim.scheduler.param_scheduler": ("leave_out_short_warmups",),
    "mmengine.runner.checkpoint": ("allow_checkpoint_types", "find_readable_checkpoint"),
    "transformers.utils": ("restore_is_safetensors_available",),
    "transformers.modeling_utils": ("restore_no_init_weights", "accept_load_in_bits"),
    "transformers.models.auto.modeling_auto": ("register_models",),
    "xtuner.configs": ("add_configs",),
    "xtuner.dataset.huggingface": ("map_with_as_many_processes_as_help",),
    "xtuner.dataset.utils": ("encode_without_bos",),
    "xtuner.engine._strategy.deepspeed": ("train_one_dtype_under_zero3", "gather_mixers_under_zero3"),
    "xtuner.engine.hooks.evaluate_chat_hook": ("chat_about_images_within_reach",),
    "xtuner.entry_point": ("replace_cli",),
    "xtuner.model.modules.dispatch": ("leave_attention_to_transformers",),
    "xtuner.model.modules.projector.modeling_projector": (
        "give_projector_tied_keys",
        "checkpoint_projector_in_the_new_way",
    ),
    "xtuner.tools.train": ("keep_optimizer_under_deepspeed",),
    "xtuner.tools.utils": ("allow_checkpoint_types",),
}

# Modules that upstream removed -> function of `xtuner_ext.compat` that fills an empty module.
STAND_INS = {
    "deepspeed.runtime.fp16.onebit": "fill_onebit_optimizers",
}


class PostImportFinder:
    """A meta path finder that adds a call after the import of the modules in the table."""

    def find_spec(self, name, path=None, target=None):
        """Finds `name` through the other finders and arranges for its repairs to run."""
        if name not in POST_IMPORT and name not in STAND_INS:
            return None
        spec = self._find_elsewhere(name, path, target)
        if name in STAND_INS:
            return spec or _stand_in_spec(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            _call_after_exec(spec.loader, POST_IMPORT[name])
        return spec

    def _find_elsewhere(self, name, path, target):
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


class StandInLoader:
    """Makes a module that the installed version of its package no longer has."""

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        _repair(module, STAND_INS[module.__name__])


def _stand_in_spec(name):
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, StandInLoader(), origin=__file__)


def _call_after_exec(loader, repairs):
    # The method is shadowed on this one loader, so its class stays what runpy, inspect and
    # importlib.resources expect.
    exec_module = loader.exec_module

    def exec_then_repair(module):
        exec_module(module)
        for repair in repairs:
            # A module may replace itself in sys.modules while it runs.
            _repair(sys.modules.get(module.__name__, module), repair)

    loader.exec_module = exec_then_repair


def _repair(module, repair):
    from xtuner_ext import compat

    try:
        getattr(compat, repair)(module)
    except Exception as error:  # a repair that no longer fits must not take the module with it
        import warnings

        warnings.warn(
            f"xtuner_ext: {repair} could not be applied to {module.__name__}: {error!r}", stacklevel=2
        )


def install():
    """Puts the finder first on `sys.meta_path`, once, unless `XTUNER_EXT=0`."""
    if os.environ.get("XTUNER_EXT") == "0":
        return
    if not any(isinstance(finder, PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PostImportFinder())
