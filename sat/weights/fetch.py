"""A released tree on disk: each part from the first place that has it, checked, and moved to its folder whole.

TARGET/transformer/latest, TARGET/transformer/1000/mp_rank_00_model_states.pt     (1 where it was converted here)
TARGET/vae/3d-vae.pt
TARGET/t5-v1_1-xxl/                                                                T5's encoder and tokenizer
"""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sat.cogvideox.presets import Preset
from sat.errors import DownloadError
from sat.weights.download import PATIENT, AbsentError, Patience
from sat.weights.places import LocalPlace, Place, open_places
from sat.weights.sources import Source
from sat.weights.survey import TEXT_ENCODER_FOLDER, survey

log = logging.getLogger(__name__)

PARTS = ("transformer", "vae", TEXT_ENCODER_FOLDER)
TOKENIZER_FILES = ("spiece.model", "tokenizer_config.json")
OPTIONAL_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json")


def fetch(
    preset: Preset,
    sources: Sequence[Source],
    target: Path,
    parts: Sequence[str] = PARTS,
    patience: Patience = PATIENT,
) -> None:
    """Bring the parts of a released model into `target`. Parts that are there already are left as they are.

    Until all are whole they are kept beside the target, and the next call goes on from there. Raises DownloadError.
    """
    target = target.resolve()
    missing = [part for part in parts if not _is_there(target / part, preset)]
    if not missing:
        log.info("%s has %s already", target, ", ".join(parts))
        return
    with _staging_folder(target, preset) as staging:
        for part in missing:
            if not (staging / "tree" / part).exists():
                _Maker(preset, part, sources, staging, patience).make()
        _publish(staging / "tree", target, missing)
        shutil.rmtree(staging)


def _is_there(folder: Path, preset: Preset) -> bool:
    """Whether a part is whole in its place; one that is not is an error, for it is not ours to delete."""
    if not folder.exists():
        return False
    finding = survey(folder)
    problem = finding.problems()[0][1] if finding.problems() else None
    if problem is None and finding.preset not in (None, preset):
        problem = f"it holds {finding.what}, not {preset.name}"
    if problem is not None:
        raise DownloadError(f"{folder} is there, but {problem}; move it away and run the same command again")
    return True


@contextmanager
def _staging_folder(target: Path, preset: Preset) -> Iterator[Path]:
    """A folder on the target's disk, in which one process at a time works."""
    beside = target.parent
    try:
        if target.exists() and (not os.access(beside, os.W_OK) or beside.stat().st_dev != target.stat().st_dev):
            staging = target / f".{preset.name}.fetching"  # the target is a disk of its own
        else:
            staging = beside / f".{target.name}.{preset.name}.fetching"
        staging.mkdir(parents=True, exist_ok=True)
        lock = (staging / "lock").open("w")
    except OSError as error:
        raise DownloadError(f"cannot write to {error.filename or beside}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DownloadError(f"another process is fetching {preset.name} to {target}; wait for it") from error
        yield staging


def _publish(tree: Path, target: Path, parts: Sequence[str]) -> None:
    """Move the parts to their place, all in one step where the target is new."""
    if not target.exists():
        tree.rename(target)
        return
    for part in parts:
        (tree / part).rename(target / part)


class _Maker:
    """Makes one part of the tree in the staging folder."""

    def __init__(self, preset: Preset, part: str, sources: Sequence[Source], staging: Path, patience: Patience) -> None:
        self.preset, self.part, self.sources, self.staging, self.patience = preset, part, sources, staging, patience
        self.raw = staging / "raw" / part
        self.made = staging / "tree" / part
        self.reasons: list[str] = []

    def make(self) -> None:
        """Find the part, bring it, check it."""
        building = self.made.with_name(f".{self.part}.making")
        shutil.rmtree(building, ignore_errors=True)
        building.parent.mkdir(parents=True, exist_ok=True)
        recipes: dict[str, Callable[[Path], bool]] = {
            "transformer": self._transformer,
            "vae": self._vae,
            TEXT_ENCODER_FOLDER: self._text_encoder,
        }
        if not recipes[self.part](building):
            reasons = "".join(f"\n  {reason}" for reason in self.reasons)
            others = " ".join(part for part in PARTS if part != self.part)
            raise DownloadError(
                f"no place has the {self.part} of {self.preset.name}:{reasons}\n"
                f"give another with --from, or leave this part out with --parts {others}"
            )
        self._check(building)
        building.rename(self.made)
        shutil.rmtree(self.raw, ignore_errors=True)

    def _check(self, building: Path) -> None:
        """Throw away what is not whole or of another model, with all that it was made of."""
        finding, complaint = survey(building), ""
        if finding.problems():
            complaint = f"what was fetched as {self.part} is not whole: {finding.problems()[0][1]}"
        elif self.part == "transformer" and finding.preset != self.preset:
            instead = f"; fetch it as {finding.preset.name.lower()}" if finding.preset else ""
            complaint = f"what was fetched is {finding.what}, not {self.preset.name}{instead}"
        if complaint:
            for folder in (building, self.raw, self.staging / "downloads", self.staging / "unpacked"):
                shutil.rmtree(folder, ignore_errors=True)
            raise DownloadError(complaint)
        log.info("%s: %s", self.part, finding.what)

    # --- finding ------------------------------------------------------------------------------------------------------

    def _places(self, *names: str) -> Iterator[tuple[Place, Path]]:
        """Each folder in which the part may lie, with the folder for what is brought from it."""
        for source in self.sources:
            try:
                for root in open_places(source, self.staging, self.patience):
                    for name in names:
                        place = root.below(name)
                        yield place, self.raw / re.sub(r"\W+", "_", place.address)
                    if isinstance(root, LocalPlace):
                        self._note(f"{source.address} has none, two folders deep")
            except AbsentError as error:
                self._note(str(error))

    def _note(self, reason: str) -> None:
        """Remember why a place was passed over."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _note_absence(self, place: Place, error: AbsentError) -> None:
        if not isinstance(place, LocalPlace):  # of those on disk, too many are tried to name each
            self._note(str(error))

    def _marker(self, place: Place, name: str, raw: Path) -> str | None:
        """The text of the small file by which a folder is known, or None if this is not such a folder."""
        try:
            return place.get(name, raw, is_probe=True).read_text(encoding="utf-8", errors="replace").strip()
        except AbsentError as error:
            self._note_absence(place, error)
            return None

    def _json_marker(self, place: Place, raw: Path, **expected: str) -> bool:
        """Whether a folder's config.json says that it holds a certain model."""
        text = self._marker(place, "config.json", raw)
        try:
            config: Any = json.loads(text or "")
        except ValueError:
            config = None
        if isinstance(config, dict) and all(config.get(key) == value for key, value in expected.items()):
            return True
        (raw / "config.json").unlink(missing_ok=True)
        return False

    def _bring_weights(self, place: Place, raw: Path, *stems: str) -> None:
        """One file of weights, or the shards that its index lists, of the first of several names that is there."""
        for stem in stems:
            try:
                index = place.get(f"{stem}.index.json", raw)
            except AbsentError:
                try:
                    place.get(stem, raw)
                except AbsentError:
                    continue
                return
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                index.unlink()
                raise DownloadError(f"{place.address} has a damaged {stem}.index.json; try another place") from error
            for shard in shards:
                if not re.fullmatch(r"[\w.-]+", shard):
                    raise DownloadError(
                        f"{place.address}: {stem}.index.json names the file {shard!r}; it is not fetched"
                    )
                place.get(shard, raw)
            return
        raise AbsentError(f"{place.address} has none of {', '.join(stems)}")

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _transformer(self, building: Path) -> bool:
        task = "i2v" if self.preset.in_channels == 32 else "t2v"
        for place, raw in self._places("transformer", f"transformer_{task}", ""):
            try:
                if self._sat_transformer(place, raw):
                    raw.rename(building)
                    return True
                if self._json_marker(place, raw, _class_name="CogVideoXTransformer3DModel"):
                    self._bring_weights(place, raw, "diffusion_pytorch_model.safetensors")
                    from sat.weights.from_diffusers import write_transformer  # seconds: it needs torch

                    log.info("transformer: giving the weights of %s SAT's names", place.address)
                    write_transformer(raw, building)
                    return True
            except AbsentError as error:
                shutil.rmtree(raw, ignore_errors=True)  # a list of files that are not there is no use to the next call
                self._note_absence(place, error)
        return False

    def _sat_transformer(self, place: Place, raw: Path) -> bool:
        """Bring the iteration that `latest` names, with all its tensor-parallel ranks."""
        name = self._marker(place, "latest", raw) or _only_iteration(place, raw)
        if name is None:
            return False
        if name != "release" and not name.isdigit():
            (raw / "latest").unlink()
            self._note(f"{place.address}: 'latest' holds {name[:40]!r}, not the number of a folder")
            return False
        log.info("transformer: from %s", place.address)
        place.get(f"{name}/mp_rank_00_model_states.pt", raw)
        for rank in range(1, 1000):
            try:
                place.get(f"{name}/mp_rank_{rank:02d}_model_states.pt", raw)
            except AbsentError:
                break
        return True

    def _vae(self, building: Path) -> bool:
        for place, raw in self._places("vae", ""):
            try:
                place.get("3d-vae.pt", raw, is_probe=True)
                log.info("vae: from %s", place.address)
                raw.rename(building)
                return True
            except AbsentError as error:
                self._note_absence(place, error)
            try:
                if self._json_marker(place, raw, _class_name="AutoencoderKLCogVideoX"):
                    self._bring_weights(place, raw, "diffusion_pytorch_model.safetensors")
                    from sat.weights.from_diffusers import write_vae  # seconds: it needs torch

                    log.info("vae: giving the weights of %s SAT's names", place.address)
                    write_vae(raw, building)
                    return True
            except AbsentError as error:
                self._note_absence(place, error)
        return False

    def _text_encoder(self, building: Path) -> bool:
        """Encoder and tokenizer, which may lie in one folder or in two."""
        encoder, tokenizer = self._encoder(), self._tokenizer()
        if encoder is None:
            self._note("there is no encoder: config.json of a T5 model, with model*.safetensors")
        if tokenizer is None:
            self._note(f"there is no tokenizer: {', '.join(TOKENIZER_FILES)}")
        if encoder is None or tokenizer is None:
            return False
        building.mkdir()
        for folder in dict.fromkeys((encoder, tokenizer)):
            for file in folder.iterdir():
                file.replace(building / file.name)
        return True

    def _encoder(self) -> Path | None:
        for place, raw in self._places(TEXT_ENCODER_FOLDER, "text_encoder", ""):
            try:
                if self._json_marker(place, raw, model_type="t5"):
                    log.info("text encoder: from %s", place.address)
                    self._bring_weights(place, raw, "model.safetensors", "pytorch_model.bin")
                    return raw
            except AbsentError as error:
                self._note_absence(place, error)
        return None

    def _tokenizer(self) -> Path | None:
        for place, raw in self._places(TEXT_ENCODER_FOLDER, "tokenizer", ""):
            try:
                place.get(TOKENIZER_FILES[0], raw, is_probe=True)
                for name in TOKENIZER_FILES[1:]:
                    place.get(name, raw)
            except AbsentError as error:
                self._note_absence(place, error)
                continue
            for name in OPTIONAL_TOKENIZER_FILES:
                try:
                    place.get(name, raw)
                except AbsentError:
                    log.debug("%s has no %s", place.address, name)
            log.info("tokenizer: from %s", place.address)
            return raw
        return None


def _only_iteration(place: Place, raw: Path) -> str | None:
    """The one iteration in a folder on disk that has lost its `latest`."""
    if not isinstance(place, LocalPlace):
        return None
    found = [file.parent.name for file in place.root.glob("*/mp_rank_00_model_states.pt")]
    if len(found) != 1 or not found[0].isdigit():
        return None
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "latest").write_text(f"{found[0]}\n", encoding="utf-8")
    return found[0]
