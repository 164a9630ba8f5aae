"""Settings of a rolling family: states computed shortly before training needs them, and deleted
afterwards.
"""

from __future__ import annotations

from pydantic import Field

from lidit.config.settings import Settings


class OnlineSettings(Settings):
    """How far encoders run before training, and what stays on disk. Nothing here changes what is
    computed.
    """

    ahead: int = Field(2, ge=1, description="windows computed before the slowest reader's own")
    keep: float = Field(0.0, ge=0, le=1, description="share of the units that is never deleted")
    budget: int | None = Field(
        None, ge=1, description="most units on disk, kept ones apart; None: as many as it takes"
    )
    patience: float = Field(
        600.0, gt=0, description="seconds: waiting for a unit, or silence of a reader, is an error"
    )
    max_actors: int | None = Field(
        None,
        ge=1,
        description="most actors of each encoder, added while trainers wait; None: the pool's",
    )
    exact: bool = Field(
        False,
        description="refuse a second kind of device: its states would differ in their last bits",
    )
