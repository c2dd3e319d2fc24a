"""Make a tiny T5 encoder and tokenizer with random weights, in the folder layout of the released t5-v1_1-xxl.

    python tools/make_tiny_t5.py --captions data/shapes/manifest.jsonl --out data/tiny-t5

The sentencepiece vocabulary is trained on the captions. The encoder is not trained: its states are a fixed mixture of
word and place, which is enough for a small model to learn from.
"""

import argparse
import io
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers loads DeepSpeed, which else looks for a GPU and warns

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging

SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def read_captions(path: Path) -> list[str]:
    """Distinct captions of a JSONL manifest or of a text file, in order; stops the program where there are none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        captions = [json.loads(line)["caption"] if path.suffix == ".jsonl" else line.strip() for line in lines]
    except OSError as error:
        sys.exit(f"cannot read --captions {path}: {error.strerror}")
    except (ValueError, KeyError) as error:
        sys.exit(f"{path}: every line must be a JSON object with a 'caption' ({error!r})")
    if not captions:
        sys.exit(f"{path} holds no caption")
    return list(dict.fromkeys(captions))


def train_tokenizer(captions: list[str], vocab_size: int) -> bytes:
    """A sentencepiece model with T5's special tokens: pad 0, end 1, unknown 2.

    Every word of the captions is a piece of its own. Training alone would cut them up: it looks for strings that
    several different words share, and a small set of captions has few words.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    known = {piece.piece for piece in proto.pieces}
    words = dict.fromkeys(f"\u2581{word}" for caption in captions for word in caption.split())
    for word in words:
        if word not in known:
            proto.pieces.add(piece=word, score=0.0)  # the best score, so a whole word wins over its parts
    return proto.SerializeToString()


def make(captions: list[str], out: Path, vocab_size: int = 128, seed: int = 0) -> None:
    """Write encoder and tokenizer to `out`, whole or not at all."""
    logging.disable_progress_bar()
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    (building / "spiece.model").write_bytes(train_tokenizer(captions, vocab_size))
    tokenizer = T5Tokenizer.from_pretrained(building)
    tokenizer.save_pretrained(building)
    (building / "tokenizer.json").unlink()  # the released folder has none, so readers build it from spiece.model
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **SIZES)
    T5EncoderModel(config).save_pretrained(building, max_shard_size="200KB")  # two shards, as released
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


def main() -> None:
    """Parse and make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True, help="a JSONL manifest with captions, or a text file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=128, help="most pieces below whole words (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the encoder's weights (default 0)")
    options = parser.parse_args()
    if (options.out / "config.json").is_file():
        print(f"{options.out} is there already", file=sys.stderr)
        return
    make(read_captions(options.captions), options.out, options.vocab_size, options.seed)
    print(f"wrote {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
