"""Where prompts come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sat.errors import ConfigError
from sat.sampling.args import SampleArgs

MARK = "@@"
"""Stands between a prompt and the path of its image."""


@dataclass(frozen=True)
class Prompt:
    """What a video is asked for."""

    text: str
    image: Path | None = None
    """The image that it continues."""


def parse_prompt(line: str, takes_image: bool) -> Prompt:
    """A prompt, or `PROMPT@@IMAGE` for a model that continues images. Raises ConfigError for the wrong one of them."""
    text, mark, path = (part.strip() for part in line.partition(MARK))
    if takes_image and not path:
        raise ConfigError(f"the model continues an image, and '{line}' names none; write PROMPT{MARK}IMAGE")
    if mark and not takes_image:
        raise ConfigError(
            f"'{line}' names an image, and the model takes none; leave {MARK}{path} out, or load a model for images"
        )
    if not takes_image:
        return Prompt(text)
    if not Path(path).is_file():
        raise ConfigError(f"there is no image {path}, which '{line}' names")
    return Prompt(text, Path(path))


def read_prompts(args: SampleArgs) -> list[str]:
    """The prompts of a file, one a line; empty lines are passed over."""
    if args.input_file is None:
        raise ConfigError("args.input_file is not set; give a file of prompts, --prompt TEXT, or args.input_type=cli")
    try:
        text = Path(args.input_file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read args.input_file {args.input_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"args.input_file {args.input_file} is no UTF-8 text: {error.reason}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"args.input_file {args.input_file} holds no prompt; write one a line")
    return prompts


def typed_prompts() -> Iterator[str]:
    """Prompts from the keyboard, until an empty line or the end of input."""
    while True:
        try:
            line = input("prompt (empty line to end): ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
