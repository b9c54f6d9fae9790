"""python -m gqa.data.mixtures --parts=DIR=3,DIR=1 --output=DIR

Mixes folders of records: the output is a folder with a manifest alone, which names its parts and how often each is
read; it stands wherever a folder of records does. The parts keep their place.

Rows of the parts alternate in a fixed pattern with these rates, to a hundredth of the smallest, and each part is read
in epochs of its own: a batch stays a function of (seed, step). Rates are given, such as DoReMi's (Xie et al. 2023), or,
with --parts=DIR,DIR --temperature=2 --maximum=65536, follow from the numbers of rows n as
min(n, maximum)^(1/temperature) (Raffel et al. 2020, §3.5.2: temperature 1 is proportional mixing).
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gqa.command_line import parse_arguments, run
from gqa.data.corpus import SPLITS
from gqa.data.prepare import (
    FORMAT,
    Manifest,
    PrepareSpec,
    cache_folder,
    default_directory,
    prepare,
    read_manifest,
    write_manifest,
)
from gqa.data.tasks import NAMED_TASKS
from gqa.errors import InputError, nearest

_ALIKE = ("inputs_length", "targets_length", "vocabulary_sha256", "noise_density", "mean_noise_span_length")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """What a run reads instead of one task's records."""

    parts: Mapping[str, float | None]  # name of a task, or folder of records -> its rate; None where sizes say it
    temperature: float | None = None  # rates are sizes to the power of 1/temperature; None: they are given
    maximum: int | None = None  # rows that a larger part counts as

    def __post_init__(self):
        if not self.parts:
            raise InputError("mixture.parts is empty; expected names of tasks or folders of records")
        for name, rate in self.parts.items():
            given = isinstance(rate, int | float) and not isinstance(rate, bool)
            if (rate is not None and not given) or given != (self.temperature is None):
                expected = "a number" if self.temperature is None else "None with a temperature"
                raise InputError(f"mixture.parts: {name!r} has the rate {rate!r}; expected {expected}")
            if given and not 0 <= rate < math.inf:
                raise InputError(f"mixture.parts: {name!r} has the rate {rate}; expected 0 or more")
        if self.temperature is None and not any(self.parts.values()):
            raise InputError("mixture.parts: all rates are 0; expected one above 0")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise InputError(f"mixture.temperature={self.temperature}; expected above 0 (1: by size)")
        if self.maximum is not None and (self.maximum < 1 or self.temperature is None):
            raise InputError(f"mixture.maximum={self.maximum}; expected 1 or more, with a temperature")


def rates_by_size(sizes: Sequence[int], temperature: float, maximum: int | None) -> list[float]:
    """Rates that add up to 1, `min(size, maximum) ** (1 / temperature)` of each other (Raffel et al. 2020, §3.5.2)."""
    powers = [min(size, maximum or size) ** (1 / temperature) for size in sizes]
    return [power / sum(powers) for power in powers]


def prepare_mixture(config: MixtureConfig, spec: PrepareSpec) -> Path:
    """The folder of a mixture, in the cache; parts that are tasks are prepared as `spec` says, from their own sources.

    Raises `InputError` for a part that is neither a task nor a folder of records, and as `write_mixture` does.
    """
    folders = {}
    for name, rate in config.parts.items():
        if name in NAMED_TASKS:
            # The source and how it is read are those of the config's own task.
            own = {} if name == spec.task else dict.fromkeys(("source", "fields", "prefix", "template"))
            part = dataclasses.replace(spec, task=name, **own)
            folder = default_directory(part)
            prepare(part, folder)
        elif Path(name).is_dir():
            folder = Path(name)
        else:
            raise InputError(
                f"mixture.parts: {name!r} is neither a task nor a folder of records; nearest: "
                f"{nearest(name, NAMED_TASKS)}"
            )
        folders[folder] = rate
    if config.temperature is not None:
        sizes = [read_manifest(folder).num_records["train"] for folder in folders]
        folders = dict(zip(folders, rates_by_size(sizes, config.temperature, config.maximum), strict=True))
    manifest = mixture(folders)
    key = hashlib.sha256(json.dumps(dataclasses.asdict(manifest), sort_keys=True).encode()).hexdigest()[:16]
    output = cache_folder() / "mixtures" / key
    if not output.exists():
        try:
            write_mixture(folders, output)
        except InputError:
            if not output.exists():  # else another process, mixing the same, was first
                raise
    return output


def mixture(folders: Mapping[Path, float]) -> Manifest:
    """The manifest of a mixture of folders of records at the given rates; those of rate 0 are left out.

    Raises `InputError` for rates below 0 or all 0, and for records that cannot be in one batch.
    """
    MixtureConfig({str(folder): rate for folder, rate in folders.items()})
    folders = {Path(folder): rate for folder, rate in folders.items() if rate}
    manifests = {folder: read_manifest(folder) for folder in folders}
    (first, like), *others = manifests.items()
    for folder, manifest in manifests.items():
        if manifest.parts is not None:
            raise InputError(f"{folder} is a mixture itself; name its parts")
        if manifest.task == "preferences":
            raise InputError(f"{folder} holds preferences, which are not mixed; put their lines into one file")
    for folder, manifest in others:
        for name in _ALIKE:
            if getattr(manifest, name) != getattr(like, name):
                raise InputError(
                    f"{folder} has {name}={getattr(manifest, name)}, {first} {getattr(like, name)}; expected the same"
                )
    total = sum(folders.values())

    def mean(name: str) -> float:
        return sum(getattr(manifests[folder], name) * rate for folder, rate in folders.items()) / total

    def together(name: str, split: str) -> str:
        return hashlib.sha256("".join(getattr(m, name)[split] for m in manifests.values()).encode()).hexdigest()[:16]

    return dataclasses.replace(
        like,
        format=FORMAT,
        task="mixture",
        vocabulary_size=max(manifest.vocabulary_size for manifest in manifests.values()),  # templates may add ids
        source="+".join(dict.fromkeys(manifest.source for manifest in manifests.values())),
        corpus_digests={split: together("corpus_digests", split) for split in SPLITS},
        **{
            name: {split: sum(getattr(m, name)[split] for m in manifests.values()) for split in SPLITS}
            for name in ("num_documents", "num_tokens", "num_records")
        },
        record_bytes={},
        record_sha256=None,
        unigram_cross_entropy=round(mean("unigram_cross_entropy"), 6),
        lengths=None,
        num_trimmed=None,
        num_skipped=None,
        fields=None,
        prefix=None,
        template=None,
        parts={str(folder.absolute()): rate / total for folder, rate in folders.items()},
    )


def check_parts(folder: str | Path, manifest: Manifest) -> None:
    """Raises `InputError` where the parts of a mixture are no longer what was mixed: rates and totals are of others."""
    for part in manifest.parts:
        _refuse_changed(f"{folder}: part {part}", read_manifest(part), manifest, _ALIKE)
    together = "vocabulary_size", "corpus_digests", "num_documents", "num_tokens", "num_records"
    _refuse_changed(f"{folder}: a part of {', '.join(manifest.parts)}", mixture(manifest.parts), manifest, together)


def _refuse_changed(part: str, now: Manifest, then: Manifest, names: Sequence[str]) -> None:
    for name in names:
        found, expected = getattr(now, name), getattr(then, name)
        if found != expected:
            raise InputError(f"{part} was prepared anew since ({name} is {found}; expected {expected}); mix again")


def write_mixture(folders: Mapping[Path, float], output: Path) -> Manifest:
    """Writes the folder of a mixture; raises `InputError` as `mixture` does and where `output` exists."""
    if output.exists():
        raise InputError(f"{output} exists already; name a new folder")
    manifest = mixture(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    partial.chmod(0o755)  # mkdtemp's folder is private
    try:
        write_manifest(partial, manifest)
        partial.rename(output)
    except OSError as error:
        if not output.exists():
            raise
        raise InputError(f"{output} exists already; name a new folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", required=True, metavar="DIR=RATE,…", help="folders of records, with their rates")
    parser.add_argument("--temperature", type=float, help="rates by size instead (1: proportional)")
    parser.add_argument("--maximum", type=int, metavar="N", help="rows that a larger part counts as")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    args = parse_arguments(parser)
    parts = {}
    for part in args.parts.split(","):
        name, equals, rate = part.rpartition("=") if args.temperature is None else (part, "", "")
        if Path(name) in map(Path, parts):
            raise InputError(f"--parts names {name!r} twice; expected each folder once")
        try:
            parts[name] = float(rate) if args.temperature is None else None
        except ValueError:
            raise InputError(
                f"--parts: {part!r} is not DIR=RATE{'' if equals else '; or give a --temperature'}"
            ) from None
    config = MixtureConfig(parts, args.temperature, args.maximum)
    rates = list(parts.values())
    if args.temperature is not None:
        sizes = [read_manifest(name).num_records["train"] for name in parts]
        rates = rates_by_size(sizes, config.temperature, config.maximum)
    manifest = write_mixture(dict(zip(map(Path, parts), rates, strict=True)), args.output)
    print("\n".join(f"{rate:8.4f}  {folder}" for folder, rate in manifest.parts.items()))


if __name__ == "__main__":
    run(main)
