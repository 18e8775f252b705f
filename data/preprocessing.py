"""The `preprocessing` of a loader of h5ad files: which of it the tokenizer does, and which the corpus is made by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.hvg import HvgOptions
from data.options import Options

_TRANSFORM_OPTIONS = ("normalize", "target_sum", "log1p")


@dataclass(frozen=True)
class Preprocessing:
    """Hold the steps that were asked for."""

    transform: Mapping[str, Any]
    """Options of the tokenizer (`normalize`, `target_sum`, `log1p`), those that were given."""
    hvg: HvgOptions | None = None
    """The choice of highly variable genes, None for all."""

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> "Preprocessing":
        """Check a table of options.

        Raises:
            DataError: an option is not known or has a value that it cannot have.
        """
        table = Options(options or {}, "preprocessing")
        table.choice("normalize", ("library_size", None), None)
        table.number_or_none("target_sum", None, low=0, above=True)
        table.flag("log1p", False)
        hvg = HvgOptions.read(table)
        table.finish()
        transform = {name: options[name] for name in _TRANSFORM_OPTIONS if options and name in options}
        return cls(transform, hvg)

    def tokenizer_options(
        self, tokenizer: Mapping[str, Any], value_kind: str
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the tokenizer's options with these steps among them, and notices.

        Values that are log-normalised already are left as they are, whatever is asked for, with a notice. A target sum
        without normalisation says nothing and is left out.

        Raises:
            DataError: the tokenizer's own options ask for something else.
        """
        for name, value in self.transform.items():
            if name in tokenizer and tokenizer[name] != value:
                raise DataError(
                    f"preprocessing.{name} is {value!r} and tokenizer.{name} {tokenizer[name]!r}; leave one of them out"
                )
        merged = {**tokenizer, **self.transform}
        if value_kind == "lognorm":
            asked = {"normalize": merged.get("normalize"), "log1p": merged.get("log1p")}
            left = [name for name, value in asked.items() if value and name in self.transform]
            for name in self.transform:
                del merged[name]
            if not left:
                return merged, []
            steps = " and ".join(
                "library-size normalisation" if name == "normalize" else name for name in left
            )
            return merged, [
                f"the values are log-normalised already, so they are taken as they are, without {steps}"
            ]
        if "normalize" in merged and merged["normalize"] is None and "target_sum" in self.transform:
            merged.pop("target_sum")
        return merged, []
