"""The base class of every setting, and the number types that settings share."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Config(BaseModel):
    """A frozen group of settings; an unknown key is an error, a default is checked like a given value."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def parse_fraction(value: Any) -> Any:
    """Read ``"2/255"`` as a number; leave anything else to the field's own check.

    Raises:
        ValueError: the text has a slash but is not a fraction.
    """
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"should be a number or a fraction such as 2/255, not {value!r}") from None
    return value


# A budget or step in pixel units where an image spans [0, 1]. L2 budgets may exceed 1, L-inf budgets may not:
# the attack that owns the number checks that (zsr/attacks/base.py), since only it knows its norm.
PixelUnits = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(parse_fraction), Field(gt=0, allow_inf_nan=False)]


_PASSWORD = re.compile(r"""(?<=://)([^/@:\s]*:)[^@\s]*(?=@)|([?&](?:ssl)?password=)[^&\s'"]*""")


def without_password(text: str) -> str:
    """The text with stars for the password of any address in it."""
    return _PASSWORD.sub(lambda found: f"{found[1] or found[2]}***", text)


def refuse_password(address: str) -> str:
    """An address as it may be kept: settings travel into checkpoints, logs and the tracker.

    Raises:
        ValueError: it has a password in it.
    """
    if _PASSWORD.search(address):
        raise ValueError(
            "has a password in it, which checkpoints, logs and the tracker would keep; leave it out of the address and set "
            "PGPASSWORD or ~/.pgpass for PostgreSQL, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow"
        )
    return address


Address = Annotated[str, AfterValidator(refuse_password)]
"""Address of a server or database, never with a password."""
