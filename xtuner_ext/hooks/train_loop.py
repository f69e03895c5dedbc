"""A training loop that resumes without reading the data it has already seen."""

from mmengine.model import is_model_wrapper
from mmengine.runner.loops import _InfiniteDataloaderIterator
from xtuner.engine.runner.loops import TrainLoop


class ResumableTrainLoop(TrainLoop):
    """XTuner's loop; on resume the sampler jumps instead of every past batch being loaded again.

    Needs a sampler with ``skip(samples)``. A model with ``check_data(dataset)`` may refuse the data.
    """

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
            self.run_iter(next(self.dataloader_iterator))
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model
