"""How an engine is made: the arguments that travel together, judged in one place."""

from dataclasses import dataclass

from acttail.base.dtypes import short_name, torch_name
from acttail.engine.formats import AUTO, DEFAULT, Format, KvFormat, kv_format, weight_format
from acttail.engine.shapes import check_group
from acttail.errors import ActTailError
from acttail.model.names import PackedSource
from acttail.sparse.policy import PrefillPolicy


@dataclass(frozen=True)
class EngineConfig:
    """What was asked of an engine; None leaves a thing to its default or to the model.

    Names of formats are taken in either spelling, and kept in the short one.

    Attributes:
        dtype: default weight format of the projections. Without one, or with ``auto``, each matrix is as wide
            as a GGUF file has it, and other models are ``bf16``.
        head_dtype: of the embedding and the output head; by default the weight format's own choice.
        kv_dtype: of the KV cache; by default the weight format's own choice.
        group: inputs that share a scale; by default the weight format's.
        threads: that decode; torch's number by default.
        prefill: which tokens of a prompt are sparse; a string is read as a policy. None for the model's
            own policy, else ``all``.

    Raises:
        ActTailError: an unknown format or policy, a group no scale is shared by, or fewer than one
            thread.
    """

    dtype: str | None = None
    head_dtype: str | None = None
    kv_dtype: str | None = None
    group: int | None = None
    threads: int | None = None
    prefill: PrefillPolicy | str | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "head_dtype"):
            asked = getattr(self, name)
            if asked is not None and (name, asked) != ("dtype", AUTO):
                object.__setattr__(self, name, weight_format(asked).name)
        if self.kv_dtype is not None:
            object.__setattr__(self, "kv_dtype", kv_format(self.kv_dtype).name)
        if self.group is not None:
            check_group(self.group)
            if self.dtype == AUTO:
                raise ActTailError(
                    "with dtype auto the file's scales stay as they are: leave out group"
                )
        if self.threads is not None and self.threads < 1:
            raise ActTailError(f"an engine decodes with at least one thread, not {self.threads}")
        if self.prefill is not None:
            object.__setattr__(self, "prefill", PrefillPolicy.parse(self.prefill))

    @property
    def weights(self) -> Format:
        """The default weight format of what is converted."""
        return DEFAULT if self.own_widths else weight_format(str(self.dtype))

    @property
    def own_widths(self) -> bool:
        """Whether each matrix stays as wide as its file has it."""
        return self.dtype in (None, AUTO)

    @property
    def own_blocks(self) -> bool:
        """Whether a GGUF file's blocks may be taken as they are."""
        return self.own_widths or bool(self.weights.gguf)

    @property
    def head(self) -> Format:
        """The weight format of the embedding and the output head of what is converted."""
        return weight_format(self.head_dtype or self.weights.head)

    def kv(self, weights: Format) -> KvFormat:
        """The format of the KV cache beside weights of a format."""
        return kv_format(self.kv_dtype or weights.kv)

    def policy(self, own: PrefillPolicy | str | None = None) -> PrefillPolicy:
        """The prefill policy of a model that has, or has not, one of its own."""
        return PrefillPolicy.choose(self.prefill, own)

    def check_transformers(self, runs: str, why: str) -> None:
        """Refuse what transformers would drop.

        Args:
            runs: torch's name of the dtype that it runs the model in, KV cache and head included.
            why: it is to run the model; begins the message.

        Raises:
            ActTailError: something else was asked for; names it and the remedy.
        """
        asked = {
            name: value
            for name in ("dtype", "head_dtype", "kv_dtype")
            if (value := getattr(self, name)) not in (None, AUTO) and torch_name(value) != runs
        }
        if self.group is not None:
            asked["group"] = self.group
        self._refuse(asked, f"{why}, and transformers runs this model in {short_name(runs)} alone")

    def check_folder(self, source: PackedSource, dtype: str, head_dtype: str) -> None:
        """Refuse what an .acttail folder, whose weights are packed, would drop.

        Args:
            source: the folder.
            dtype: default weight format of what it holds.
            head_dtype: of its embedding and output head.

        Raises:
            ActTailError: something else was asked for; names it and the remedy.
        """
        held = {"dtype": dtype, "head_dtype": head_dtype, "group": None}
        asked = {
            key: value
            for key, own in held.items()
            if (value := getattr(self, key)) not in (None, AUTO) and value != own
        }
        self._refuse(
            asked,
            f"{source.name} holds {dtype} weights with a head in {head_dtype}; convert {source.origin} again",
        )

    @staticmethod
    def _refuse(asked: dict[str, object], why: str) -> None:
        if asked:
            what = ", ".join(f"{name}={value}" for name, value in asked.items())
            raise ActTailError(f"{why}: leave out {what}")
