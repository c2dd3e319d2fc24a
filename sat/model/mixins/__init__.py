"""Parts for any model."""

from sat.model.base_model import BaseMixin, non_conflict, replacable

__all__ = ["BaseMixin", "non_conflict", "replacable"]
