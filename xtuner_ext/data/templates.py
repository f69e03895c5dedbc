"""Conversation templates.

The fields are XTuner's: a turn reads ``INSTRUCTION`` with the question, the answer, ``SUFFIX``, then
``SEP`` before the next turn; the answer and the suffix are trained. Names with a hyphen are InternVL's,
which put no newline between turns; names with an underscore are XTuner's.
"""

import dataclasses

from ..errors import UserError

INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
INTERNVL2_5_SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"

LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written down.

    Attributes:
        system (str): Block around the system message, with ``{system}``.
        instruction (str): Block around a question, with ``{input}``; ends where the answer begins.
        suffix (str): Ends an answer; trained.
        sep (str): Between turns; not trained.
        default_system (str | None): System message when the sample brings none.
        stop_words (tuple[str, ...]): End generation besides the end-of-sequence token.
        lead (str): Opens an answer; trained, and left to the model when it answers.
        opening (str): Stands before the first question, after the system message if there is one.
    """

    system: str
    instruction: str
    suffix: str = ""
    sep: str = ""
    default_system: str | None = None
    stop_words: tuple = ()
    lead: str = ""
    opening: str = ""

    def prompt(self, question, first=True, system=None):
        """Text up to where the answer begins.

        Args:
            question (str): The user's words.
            first (bool): Whether this opens the conversation; later turns start with ``sep``.
            system (str, optional): Overrides the default system message.

        Returns:
            str: The rendered prompt.
        """
        system = self.default_system if system is None else system
        head = (self.system.format(system=system) if system else "") + self.opening if first else self.sep
        return head + self.instruction.replace("{input}", question)

    def answer(self, text, ended=True):
        """str: What the model is to say for an answer; one that was cut off has no suffix."""
        return self.lead + text + (self.suffix if ended else "")

    def jinja(self):
        """str: The same conversations as a Hugging Face chat template; images become ``<image>`` lines."""
        user, system = self.instruction.split("{input}"), (self.system or "{system}").split("{system}")
        lines, text = [], self.opening
        if self.default_system:
            text = system[0] + self.default_system + system[1] + self.opening
        if text:
            lines.append("{%- if messages[0]['role'] != 'system' %}{{ " + _quote(text) + " }}{% endif -%}")
        lines += [
            "{%- for message in messages -%}",
            "{%- set text = namespace(value='') -%}",
            "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}{%- else -%}",
            "{%- for part in message['content'] -%}",
            "{%- set piece = '<image>\n' if part['type'] == 'image' else part['text'] -%}",
            "{%- set text.value = text.value + piece -%}",
            "{%- endfor -%}{%- endif -%}",
            "{%- if message['role'] == 'system' %}{{ ",
            f"{_quote(system[0])} + text.value + {_quote(system[1] + self.opening)}" + " }}",
            "{%- elif message['role'] == 'user' %}{{ " + f"{_quote(user[0])} + text.value + {_quote(user[1])}" + " }}",
            "{%- else %}{{ " + f"{_quote(self.lead)} + text.value + {_quote(self.suffix + self.sep)}",
            " }}{% endif -%}",
            "{%- endfor -%}",
        ]
        return "".join(lines)


def _quote(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _chatml(newline, default_system):
    return Template(
        system="<|im_start|>system\n{system}<|im_end|>" + newline,
        instruction="<|im_start|>user\n{input}<|im_end|>" + newline + "<|im_start|>assistant\n",
        suffix="<|im_end|>",
        sep=newline,
        default_system=default_system,
        stop_words=("<|im_end|>",),
    )


TEMPLATES = {
    "internlm2-chat": _chatml("", INTERNVL_SYSTEM),
    "Hermes-2": _chatml("", INTERNVL_SYSTEM),
    "internvl2_5": _chatml("\n", INTERNVL2_5_SYSTEM),
    "internlm2_chat": _chatml("\n", None),
    "qwen_chat": _chatml("\n", None),
    # LLaVA-1.5's; XTuner's "vicuna" breaks lines between turns, which LLaVA was not trained on.
    "vicuna_v1": Template(
        system="{system} ",
        instruction="USER: {input} ASSISTANT:",
        suffix="</s>",
        default_system=LLAVA_SYSTEM,
        stop_words=("</s>",),
        lead=" ",
    ),
    "qwen2": _chatml("\n", "You are a helpful assistant."),
    "qwen2_5": _chatml("\n", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "smollm2": _chatml("\n", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    # InternVL-Chat-V1-1's, which has no system message of its own and sets a space before the first question.
    "internvl_zh": Template(
        system="{system}",
        instruction="<human>: {input} <bot>:",
        suffix="</s>",
        stop_words=("</s>",),
        lead=" ",
        opening=" ",
    ),
    "phi3-chat": Template(
        system="<|system|>\n{system}<|end|>",
        instruction="<|user|>\n{input}<|end|><|assistant|>\n",
        suffix="<|end|>",
        default_system=INTERNVL_SYSTEM,
        stop_words=("<|end|>",),
    ),
}


def render(template, turns, system=None):
    """Write a conversation down up to the answer that is wanted.

    Args:
        template (Template): Conversation template.
        turns (list[tuple[str, str | None]]): Questions and answers; the last answer is None.
        system (str, optional): System message.

    Returns:
        str: The prompt.
    """
    text = ""
    for number, (question, answer) in enumerate(turns):
        text += template.prompt(question, first=number == 0, system=system)
        text += "" if answer is None else template.answer(answer)
    return text


def get_template(name):
    """Look a template up by InternVL's or XTuner's name.

    Args:
        name (str): Such as ``internlm2-chat`` (InternVL) or ``vicuna`` (XTuner).

    Returns:
        Template: The template.

    Raises:
        UserError: For a name that neither knows.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    # Imported here: XTuner's package takes seconds to load.
    from xtuner.utils import PROMPT_TEMPLATE

    if name not in PROMPT_TEMPLATE:
        known = ", ".join(sorted({*TEMPLATES, *PROMPT_TEMPLATE}))
        raise UserError(f"unknown prompt template {name!r}, expected one of {known}")
    fields = PROMPT_TEMPLATE[name]
    return Template(
        system=fields.get("SYSTEM", ""),
        instruction=fields["INSTRUCTION"].replace("{bot_name}", "BOT").replace("{round}", "1"),
        suffix=fields.get("SUFFIX", ""),
        sep=fields.get("SEP", ""),
        stop_words=tuple(fields.get("STOP_WORDS", ())),
    )
