"""What the bodies of all requests have in common: null for absent, unknown fields, refusals."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from acttail.serve.unsupported import refuse_surrogates, refuse_unsupported


class Model(BaseModel):
    """A part of a body."""

    # Unknown fields pass: clients send what one server or another takes. Those that ask for something this
    # one is known not to do are in unsupported.py.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Body(Model):
    """A body.

    Attributes:
        takes: fields of unsupported.py that this kind of request has nevertheless.
    """

    takes: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: Any) -> Any:
        """Take null for absent, as OpenAI's API does, and refuse what no field may hold."""
        refuse_surrogates(data)
        if not isinstance(data, dict):
            return data
        refuse_unsupported(data, cls.takes)
        return {name: value for name, value in data.items() if value is not None}
