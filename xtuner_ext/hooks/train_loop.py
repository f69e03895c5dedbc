"""A training loop that resumes without reading the data it has already seen."""

import math

from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner.loops import _InfiniteDataloaderIterator
from xtuner.engine.runner.loops import TrainLoop

from ..errors import UserError
from ..finetune.batch import accumulation


class ResumableTrainLoop(TrainLoop):
    """XTuner's loop; on resume the sampler jumps instead of every past batch being loaded again.

    Needs a sampler with ``skip(samples)``. A model with ``check_data(dataset)`` may refuse the data. A model with
    ``begin_step(batches)`` sees all iterations' batches of an optimizer step before the first of them runs; they are
    kept in memory until then. ``max_epochs`` are rounded up to whole optimizer steps, and a config that states its
    ``total_batch_size`` must get just that.
    """

    def __init__(self, runner, dataloader, max_iters=None, max_epochs=None, **kwargs):
        self.count = _accumulative_counts(runner.cfg, dataloader)
        if max_epochs is not None and max_iters is None:
            if isinstance(dataloader, dict):
                different = runner._randomness_cfg.get("diff_rank_seed", False)
                dataloader = runner.build_dataloader(dataloader, seed=runner.seed, diff_rank_seed=different)
            steps = math.ceil(max_epochs * len(dataloader) / self.count)
            max_iters, max_epochs = steps * self.count, None
        super().__init__(runner, dataloader, max_iters=max_iters, max_epochs=max_epochs, **kwargs)

    def run(self):
        """Train from the current iteration to the last."""
        model = self.runner.model.module if is_model_wrapper(self.runner.model) else self.runner.model
        if hasattr(model, "check_data"):
            model.check_data(self.dataloader.dataset)
        done = self._iter
        if done:
            self.dataloader.sampler.skip(done * self.dataloader.batch_size)
            # Workers of the iterator made at construction have already begun at the first sample.
            self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            for batch in self._step_batches(model):
                self.run_iter(batch)
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _step_batches(self, model):
        if not hasattr(model, "begin_step"):
            return [next(self.dataloader_iterator)]
        rest = min(self.count - self._iter % self.count, self._max_iters - self._iter)
        batches = [next(self.dataloader_iterator) for _ in range(rest)]
        model.begin_step(batches)
        return batches


def _accumulative_counts(config, dataloader):
    """int: Iterations of one optimizer step, which must make up the total batch where the config states it."""
    # XTuner moves the number there under DeepSpeed.
    strategy = config.get("strategy") or {}
    count = strategy.get("gradient_accumulation_steps") or config.optim_wrapper.get("accumulative_counts")
    if config.get("total_batch_size") is not None:
        size = dataloader["batch_size"] if isinstance(dataloader, dict) else dataloader.batch_size
        wanted = accumulation(config.total_batch_size, size, get_world_size())
        if count != wanted:
            raise UserError(
                f"total_batch_size={config.total_batch_size} needs {wanted} iterations of {size} samples x "
                f"{get_world_size()} processes for each optimizer step, but accumulative_counts is {count}: "
                "start the run with `xtuner-ext train`, which sets it"
            )
    return count or 1
