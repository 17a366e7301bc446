"""detectron2's own config files, which are not read: each is pointed to its counterpart here."""

import re
from pathlib import Path

from common.config import ConfigError

HERE = Path(__file__).resolve().parents[1]
CONFIGS = HERE / "configs"
SECTION = re.compile(
    r"^(_BASE_|VERSION|MODEL|SOLVER|DATASETS|DATALOADER|INPUT|TEST)\s*:", re.MULTILINE
)
MOST = 3  # counterparts that a message names


def check_config_file(path: Path) -> None:
    """ConfigError where `path` is a config of detectron2, or no file although a config of its name is here."""
    if not path.is_file():
        found = counterparts(path)
        if found:
            raise ConfigError(f"{path}: no such file; did you mean {' or '.join(found)}?")
        return

    text = path.read_text(encoding="utf-8", errors="replace")
    if SECTION.search(text):
        found = " or ".join(counterparts(path)) or "none of this name; see configs/"
        raise ConfigError(
            f"{path}: a config of detectron2, which is not read; its counterpart here: {found}"
        )


def counterparts(path: Path) -> list[str]:
    """The configs here that have the file name of `path`: of its data set, where its folders name one; else of all."""
    named = {part.lower().replace("-", "_") for part in path.parts[:-1]}
    runnable = [
        found for found in sorted(CONFIGS.rglob("*.yaml")) if "_base_" not in found.parts
    ]
    same = [found for found in runnable if found.name == path.name]

    def shared(found: Path) -> int:
        return len(named & set(found.relative_to(CONFIGS).parts[:-1]))

    best = max(map(shared, same), default=0)
    nearest = [found for found in same if shared(found) == best]
    return [str(found.relative_to(HERE)) for found in nearest[:MOST]]
