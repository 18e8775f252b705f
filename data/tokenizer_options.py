"""The options of a tokenizer: read and checked, completed with their defaults, and fitted to the training cells."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from data.binning import fit_edges
from data.corpus import CorpusInfo
from data.errors import DataError
from data.genes import GeneSpace, SourceGenes, looks_like_ensembl, match_genes, strip_version
from data.hashing import Stream
from data.options import Options
from data.order import choose_rows
from data.readers import open_columns, open_reader
from data.tokenizers import BinningMethod, ExpressionTransform, Strategy, Tokenizer

FITTED_OPTIONS = ("target_sum", "edges", "gene_medians")
"""Options that may come from the data or a file; a run must go on with the same."""
CELLS_FITTED = 5000
"""Training cells, a seeded choice, that quantiles and medians are computed from."""
_ROWS_AT_ONCE = 256


def build_tokenizer(
    options: Mapping[str, Any],
    *,
    value_kind: Literal["counts", "lognorm"],
    measured: Sequence[NDArray[np.bool_]],
    genes: GeneSpace | None = None,
    where: str = "tokenizer",
) -> Tokenizer:
    """Check a tokenizer's options and build it.

    Args:
        options: the table in the YAML file; `strategy` decides which others there are. Those of `FITTED_OPTIONS` that
            need fitting must be there (see `fitted_options`).
        value_kind: what the corpus holds, which decides whether values are normalised.
        measured: for each source of the corpus a mask of the genes that it measured.
        genes: the gene space, which `gene_medians` need.
        where: place of the options in the YAML file.
    """
    table = Options(options, where)
    if "strategy" not in table:
        table.wrong("strategy", f"missing; it must be one of {', '.join(get_args(Strategy))}")
    strategy = table.choice("strategy", get_args(Strategy), "binned_expression")
    arguments: dict[str, Any] = {
        "strategy": strategy,
        "max_genes": table.count("max_genes", 2048, minimum=2),
        "prepend_cls": table.flag("prepend_cls", True),
        "padding": table.choice("padding", ("longest", "max_genes"), "longest"),
        "transform": _transform(table, value_kind),
        **_binning(table, 51 if strategy == "binned_expression" else None),
    }
    selection = table.choice("gene_selection", ("top", "random"), None)
    with_zeros = strategy != "rank_value" and table.flag("include_zero_genes", False)
    if with_zeros and selection == "top":
        table.wrong(
            "gene_selection", "top has no meaning with include_zero_genes: true; set random or leave it out"
        )
    medians = table.take_any("gene_medians") if strategy == "rank_value" else None
    table.finish()
    if medians is not None:
        assert genes is not None, "medians are looked up by the genes of the gene space"
        arguments["gene_medians"] = _medians_of(genes, medians, f"{where}.gene_medians")
        arguments["is_logarithm"] = value_kind == "lognorm"
    if with_zeros:
        arguments["measured"] = tuple(np.flatnonzero(mask).astype(np.int32) for mask in measured)
    return Tokenizer(**arguments, gene_selection=selection or ("random" if with_zeros else "top"))


def complete_options(tokenizer: Tokenizer, genes: GeneSpace | None = None) -> dict[str, Any]:
    """Return the options that build this tokenizer, none left to a default, a file or fitting."""
    options: dict[str, Any] = {
        name: getattr(tokenizer, name)
        for name in ("strategy", "max_genes", "prepend_cls", "padding", "gene_selection")
    }
    transform = tokenizer.transform
    options["normalize"] = None if transform.target_sum is None else "library_size"
    if transform.target_sum is not None:
        options["target_sum"] = transform.target_sum
    options["log1p"] = transform.log1p
    if tokenizer.n_bins is not None:
        options |= {"n_bins": tokenizer.n_bins, "binning_method": tokenizer.binning_method}
        if tokenizer.binning_method == "uniform":
            options["max_value"] = tokenizer.max_value
        if tokenizer.edges is not None:
            options["edges"] = list(tokenizer.edges)
    if tokenizer.strategy != "rank_value":
        options["include_zero_genes"] = tokenizer.measured is not None
    if tokenizer.gene_medians is not None:
        assert genes is not None
        known = zip(genes.ids, tokenizer.gene_medians.tolist(), strict=True)
        options["gene_medians"] = {gene: median for gene, median in known if np.isfinite(median)}
    return options


def fitted_options(
    options: Mapping[str, Any], info: CorpusInfo, training: NDArray[np.bool_] | None, seed: int
) -> dict[str, Any]:
    """Return the options with what they leave to the training cells: `target_sum: null` and quantile `edges`.

    A target sum is the median of the cells' totals, the edges are quantiles of expression, both over
    `CELLS_FITTED` training cells, chosen by the seed: the same numbers on every rank.
    """
    if not isinstance(options, Mapping):
        return options  # what is no table at all is told by whoever builds it
    result = dict(options)
    kind = info.manifest.value_kind
    normalize = options.get("normalize", "library_size" if kind == "counts" else None)
    rows: NDArray[np.int64] | None = None
    if normalize == "library_size" and options.get("target_sum", 0) is None:
        rows = _sample(info, training, seed)
        totals = cast(NDArray[Any], open_columns(info, ["total"]).gather(rows)["total"])
        result["target_sum"] = float(np.median(totals[totals > 0]) if (totals > 0).any() else 1.0)
    if options.get("binning_method") == "quantile" and options.get("edges") is None:
        result.pop("edges", None)
        # Built once without edges, so that mistakes are told before anything is read, and the transform is known.
        without = {**result, "binning_method": "per_cell"}
        built = build_tokenizer(without, value_kind=kind, measured=[], genes=info.gene_space)
        if built.n_bins is not None:
            values = _expression(info, built, _sample(info, training, seed) if rows is None else rows)
            result["edges"] = fit_edges(values, built.n_bins)
    return result


def _binning(table: Options, default: int | None) -> dict[str, Any]:
    """Read the options of the bins, which only `binned_expression` has unasked."""
    n_bins = table.count_or_none("n_bins", default, minimum=3)
    method = table.choice("binning_method", get_args(BinningMethod), "uniform")
    binning: dict[str, Any] = {"n_bins": n_bins, "binning_method": method}
    if n_bins is None:
        for name in ("binning_method", "max_value", "edges"):
            if name in table:
                table.wrong(name, "there are no bins without n_bins")
            table.take_any(name)
        if default is not None:
            table.wrong("n_bins", "got None; binned_expression needs a whole number, at least 3")
        return binning
    if method == "uniform":
        binning["max_value"] = table.number("max_value", 10.0, low=0, above=True)
    if method == "quantile":
        edges = table.take_any("edges")
        is_list = isinstance(edges, list | tuple) and all(isinstance(edge, int | float) for edge in edges)
        if edges is None:
            table.wrong("edges", "missing; a loader fits them to its training cells")
        elif (
            not is_list
            or len(edges) != n_bins - 2
            or any(b < a for a, b in zip(edges, edges[1:], strict=False))
        ):
            table.wrong("edges", f"they must be n_bins - 2 = {n_bins - 2} ascending numbers")
        else:
            binning["edges"] = tuple(map(float, edges))
    return binning


def _transform(table: Options, value_kind: str) -> ExpressionTransform:
    """Read the options of the transform; what the corpus holds decides their defaults."""
    is_counts = value_kind == "counts"
    normalize = table.choice("normalize", ("library_size", None), "library_size" if is_counts else None)
    target_sum = table.number_or_none("target_sum", 1e4, low=0, above=True)
    log1p = table.flag("log1p", is_counts)
    if not is_counts:
        reason = "the corpus holds log-normalised values already; leave this option out"
        if normalize is not None:
            table.wrong("normalize", reason)
        if log1p:
            table.wrong("log1p", reason)
    if normalize is None and "target_sum" in table:
        table.wrong("target_sum", "nothing is scaled to it without normalize: library_size")
    elif target_sum is None:
        table.wrong(
            "target_sum", "null stands for the median of the training cells, which only a loader knows"
        )
    return ExpressionTransform(target_sum if normalize is not None else None, log1p)


def _sample(info: CorpusInfo, training: NDArray[np.bool_] | None, seed: int) -> NDArray[np.int64]:
    rows = np.arange(info.num_cells) if training is None else np.flatnonzero(training)
    return rows[choose_rows(len(rows), CELLS_FITTED, seed, Stream.FIT_SAMPLE)]


def _expression(info: CorpusInfo, tokenizer: Tokenizer, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the expression of all expressed genes of some cells, as the transform leaves it."""
    reader = open_reader(info, ["total"])
    values = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        cells = reader.read(rows[start : start + _ROWS_AT_ONCE])
        each = tokenizer.transform.apply(cells.counts, cells.offsets, cells.columns["total"])
        values.append(each[cells.counts > 0])
    found = np.concatenate(values)
    if not len(found):
        raise DataError(f"{info.path}: no training cell expresses a gene, so there is nothing to fit bins to")
    return found


def _medians_of(genes: GeneSpace, given: Any, where: str) -> NDArray[np.float32]:
    """Return the median of each gene of the space, NaN for those that have none."""
    medians = _read_medians(Path(given), where) if isinstance(given, str) else given
    if not isinstance(medians, Mapping) or not medians:
        raise DataError(
            f"{where}: got {type(given).__name__}; it must be the path of a file of genes and medians"
        )
    wrong = [
        f"{gene} ({median!r})"
        for gene, median in medians.items()
        if not isinstance(median, int | float) or not 0 < median < float("inf")
    ]
    if wrong:
        raise DataError(
            f"{where}: a median must be a number above 0; {len(wrong)} are not, such as {wrong[0]}"
        )
    names = tuple(map(str, medians))
    ids = tuple(map(strip_version, names)) if looks_like_ensembl(names) else None
    source = SourceGenes(where, ids, None if ids is not None else names)
    if ids is not None and genes.key == "symbol":
        raise DataError(
            f"{where}: it names genes by Ensembl ids, the data by symbols; give a file by symbols"
        )
    index, _ = match_genes(genes, source)
    if not (index >= 0).any():
        raise DataError(
            f"{where}: none of its {len(names):,} genes ({', '.join(names[:3])}) is among the data's "
            f"({', '.join(genes.ids[:3])})"
        )
    result = np.full(len(genes), np.nan, np.float32)
    result[index[index >= 0]] = np.array(list(medians.values()), np.float32)[index >= 0]
    return result


def _read_medians(path: Path, where: str) -> dict[str, float]:
    """Read a JSON object {gene: median}, or a table of two columns, with or without a header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return dict(json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{where}: {path} cannot be read as text ({error}); it must be .json, .csv or .tsv with genes and medians, "
            "and is never unpickled"
        ) from error
    rows = [
        row for row in csv.reader(text.splitlines(), delimiter="," if path.suffix == ".csv" else "\t") if row
    ]
    medians: dict[str, float] = {}
    for number, row in enumerate(rows, 1):
        try:
            gene, median = row[0].strip(), float(row[1])
        except (IndexError, ValueError):
            if number == 1:
                continue  # a header
            raise DataError(f"{where}: {path}, line {number}: {row} is not a gene and its median") from None
        if gene in medians:
            raise DataError(f"{where}: {path}, line {number}: {gene} has a median already")
        medians[gene] = median
    return medians
