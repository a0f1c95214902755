"""Store the result of a search for heads: a JSON file that ``enable(pipe, SoftPAG(heads="heads.json"))`` reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.evaluation import Arm, format_arm
from dit_attn.processors.methods.softpag import SoftPAG

FILE_NAME = "heads.json"


@dataclass(frozen=True)
class HeadSet:
    """Heads with their strengths, and how they were found.

    Attributes:
        model: name of the model.
        transformer: class of its transformer.
        target, joint: of the perturbation, see :class:`SoftPAG`.
        heads: (layer, head, strength), in the order of the layers.
        scale: guidance scale w of the search.
        search: objective, strategy, pairs, number of evaluations and the like.
        rounds: per round the heads that joined and the score of every head measured.
        checks: scores of the set and of the baselines, by name; see :meth:`HeadHunter.search`.
        layers: number of heads by layer.
    """

    model: str
    transformer: str
    target: str
    joint: str
    heads: Arm
    scale: float
    search: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)

    @property
    def method(self) -> SoftPAG:
        """The heads as a method, to ``enable``, save or upload."""
        return SoftPAG(
            heads=format_arm(self.heads) if self.heads else "", scale=self.scale, target=self.target, joint=self.joint,
            found_on=self.transformer,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "heads": [list(head) for head in self.heads]}

    def save(self, path: str | Path) -> Path:
        """Write a file, atomically, and return its path.

        Args:
            path: the file, or a folder that gets ``heads.json``.

        Raises:
            OSError: it cannot be written.
        """
        place = Path(path).expanduser()
        place = place if place.suffix == ".json" else place / FILE_NAME
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(place, self.to_dict())
        return place

    @staticmethod
    def load(path: str | Path) -> HeadSet:
        """Read a file that :meth:`save` wrote.

        Raises:
            DitAttnError: it is missing, no JSON, or no result of a search.
        """
        place = Path(path).expanduser()
        place = place / FILE_NAME if place.is_dir() else place
        try:
            data = files.parse_json(place.read_bytes())
            arm = tuple((str(layer), int(head), float(u)) for layer, head, u in data.pop("heads"))
            return HeadSet(heads=arm, **data)
        except OSError as error:
            raise DitAttnError(f"cannot read {place} ({error.strerror}); check the path") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DitAttnError(f"{place} is no result of `dit-attn search` ({error}); search again") from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the method and the full result to the Hugging Face Hub; ``enable(pipe, repo_id)`` uses it from there.

        Args:
            repo_id: ``"org/name"``.
            kwargs: further arguments of ``HfApi.upload_file``.

        Returns:
            Address of the commit.
        """
        from huggingface_hub import HfApi

        self.method.push_to_hub(repo_id, **kwargs)
        body = (json.dumps(self.to_dict(), indent=1) + "\n").encode()
        return str(HfApi().upload_file(path_or_fileobj=body, path_in_repo=FILE_NAME, repo_id=repo_id, **kwargs))
