"""Writes a trained teacher as a model folder."""

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper


class ExportTeacherHook(Hook):
    """After training, write the decoder in HoVLE's layout.

    Args:
        out (str): Folder to write.
        tokenizer (str): Folder of the tokenizer.
        dtype (str): Of the stored weights.
    """

    def __init__(self, out, tokenizer, dtype="bfloat16"):
        self.out, self.tokenizer, self.dtype = out, tokenizer, dtype

    @master_only
    def after_train(self, runner):
        """Write the folder."""
        from ..convert.digits_teacher import write_digits_teacher

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        write_digits_teacher(model.llm, self.tokenizer, self.out, self.dtype)
        print_log(f"teacher written to {self.out}", logger="current")
