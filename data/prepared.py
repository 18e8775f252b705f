"""Loaders that begin with what a user has, h5ad files or a query of the Census, as corpora that are kept and reused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.cell_source import CellSource, Layout, cell_loader
from data.census import CensusQuery, census_corpus
from data.conversion_plan import ConversionSettings
from data.corpus import CorpusInfo
from data.corpus_cache import convert_once, made_once, narrowed_name, obs_requests, say
from data.gene_vocabulary import FROM_DATA, gene_vocabulary
from data.hvg import choose_genes, narrow_corpus
from data.labels import LabelTask
from data.preprocessing import Preprocessing

_WORTH_SAYING = 5e-5
"""Share of dropped counts that is not 0.00 % when it is shown."""


def h5ad_loader(
    paths: Sequence[str] | str,
    *,
    tokenizer: Mapping[str, Any],
    gene_vocab: str = FROM_DATA,
    preprocessing: Mapping[str, Any] | None = None,
    obs: Sequence[str] = (),
    technical_batch: str | None = None,
    cache_dir: str = "cache",
    layer: str = "auto",
    gene_column: str | None = None,
    min_genes: int = 1,
    min_match: float = 0.5,
    masking: Mapping[str, Any] | None = None,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    limit_cells: int | None = None,
    layout: Layout = "padded",
    shuffle_block: int = 64,
    shuffle_window: int = 8192,
    num_workers: int = 0,
    label: str | Sequence[str] | None = None,
    label_task: LabelTask = "classification",
    stratify: bool = False,
    sampling: Mapping[str, Any] | None = None,
) -> CellSource:
    """Read h5ad files as a source of batches: convert them where that was not done before, and open the corpus.

    Args:
        paths: h5ad files, or patterns such as `data/*.h5ad`.
        tokenizer: options of the tokenizer (see `data.tokenizers`).
        gene_vocab: the genes that token ids stand for: `human_protein_coding`, `human_all`, `mouse_protein_coding`,
            `mouse_all`; `from_data`, all genes of the files; or the path of a gene list, or of a corpus, run,
            checkpoint or export, whose `genes.json` is taken.
        preprocessing: `normalize`, `target_sum`, `log1p` (of the values that the model sees; library sizes are over
            all genes of a file), and `hvg_selection`, `hvg_flavor`, `hvg_batch_key`, `hvg_whitelist`,
            `hvg_max_cells` (see `data.hvg`).
        obs: obs columns to keep for `CellSource.obs`, by their name, or `NAME=COLUMN` to rename one.
        technical_batch: obs column of the technical batch; `@file` takes each file as one; None keeps none.
        cache_dir: folder of the converted corpora.
        layer: matrix to read; `auto` takes the first of layers['counts'], raw.X, X that holds counts.
        gene_column: column of var with the gene names; None finds it by content.
        min_genes: cells with fewer expressed genes of the vocabulary are dropped.
        min_match: least share of a file's genes, or of the vocabulary's if these are fewer, that must match.
        masking: and all that follow: as in `data.cell_source.cell_loader`.
        val_fraction: see there.
        split_seed: see there.
        limit_cells: see there.
        layout: see there.
        shuffle_block: see there.
        shuffle_window: see there.
        num_workers: see there.
        label: see there; the column is kept without being named in `obs`.
        label_task: see there.
        stratify: see there.
        sampling: see there; its column is kept without being named in `obs`.

    Raises:
        DataError: a file cannot be read, or does not hold what is asked for.
    """
    steps = Preprocessing.read(preprocessing)
    settings = ConversionSettings(
        genes="union" if gene_vocab == FROM_DATA else gene_vocabulary(gene_vocab),
        gene_column=gene_column,
        layer=layer,
        obs=obs_requests(obs, _needed(label, sampling, steps), technical_batch),
        min_genes=min_genes,
        min_match=min_match,
    )
    corpus = convert_once([paths] if isinstance(paths, str) else paths, Path(cache_dir), settings)
    return open_prepared(
        corpus,
        steps,
        cache_dir=Path(cache_dir),
        min_genes=min_genes,
        tokenizer=tokenizer,
        masking=masking,
        val_fraction=val_fraction,
        split_seed=split_seed,
        limit_cells=limit_cells,
        layout=layout,
        shuffle_block=shuffle_block,
        shuffle_window=shuffle_window,
        num_workers=num_workers,
        label=label,
        label_task=label_task,
        stratify=stratify,
        sampling=sampling,
    )


def census_loader(
    census: Mapping[str, Any] | None = None,
    *,
    tokenizer: Mapping[str, Any],
    gene_vocab: str = FROM_DATA,
    preprocessing: Mapping[str, Any] | None = None,
    obs: Sequence[str] = (),
    technical_batch: str | None = None,
    cache_dir: str = "cache",
    min_genes: int = 1,
    min_match: float = 0.5,
    masking: Mapping[str, Any] | None = None,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    limit_cells: int | None = None,
    layout: Layout = "padded",
    shuffle_block: int = 64,
    shuffle_window: int = 8192,
    num_workers: int = 0,
    label: str | Sequence[str] | None = None,
    label_task: LabelTask = "classification",
    stratify: bool = False,
    sampling: Mapping[str, Any] | None = None,
) -> CellSource:
    """Read cells of the CELLxGENE Census as a source of batches: read them once into a corpus, and open that.

    Args:
        census: which cells: `organism`, `census_version`, `filters` or `obs_value_filter`, `var_value_filter`,
            `obs_columns`, `uri` (see `data.census.CensusQuery`).
        tokenizer: options of the tokenizer (see `data.tokenizers`).
        gene_vocab: as in `h5ad_loader`; `from_data` takes the genes of the Census.
        preprocessing: as in `h5ad_loader`.
        obs: as in `h5ad_loader`, beside `obs_columns`.
        technical_batch: obs column of the technical batch; `@file` takes each dataset as one; None keeps none.
        cache_dir: folder of the corpora.
        min_genes: cells with fewer expressed genes of the vocabulary are dropped.
        min_match: least share of the genes, or of the vocabulary's if these are fewer, that must match.
        masking: and all that follow: as in `h5ad_loader`.
        val_fraction: see there.
        split_seed: see there.
        limit_cells: see there.
        layout: see there.
        shuffle_block: see there.
        shuffle_window: see there.
        num_workers: see there.
        label: see there.
        label_task: see there.
        stratify: see there.
        sampling: see there.

    Raises:
        DataError: the Census cannot be read, or does not hold what is asked for.
    """
    steps = Preprocessing.read(preprocessing)
    corpus = census_corpus(
        census,
        gene_vocab=gene_vocab,
        obs=obs,
        needed=_needed(label, sampling, steps),
        technical_batch=technical_batch,
        cache_dir=cache_dir,
        min_genes=min_genes,
        min_match=min_match,
    )
    source = open_prepared(
        corpus,
        steps,
        cache_dir=Path(cache_dir),
        min_genes=min_genes,
        tokenizer=tokenizer,
        masking=masking,
        val_fraction=val_fraction,
        split_seed=split_seed,
        limit_cells=limit_cells,
        layout=layout,
        shuffle_block=shuffle_block,
        shuffle_window=shuffle_window,
        num_workers=num_workers,
        label=label,
        label_task=label_task,
        stratify=stratify,
        sampling=sampling,
    )
    query, build = CensusQuery.read(census), (corpus.manifest.origin or {}).get("build")
    release = f"cells of the Census of {build}, " if build else ""
    notices = [*query.notices, f"{release}read into {corpus.path}"]
    if query.is_moving:
        notices.append(
            f"census_version {query.census_version} is {build} today; name that date to resume with it"
        )
    source.notices = [*notices, *source.notices]
    return source


def open_prepared(
    corpus: CorpusInfo,
    steps: Preprocessing,
    *,
    cache_dir: Path,
    min_genes: int,
    tokenizer: Mapping[str, Any],
    **arguments: Any,
) -> CellSource:
    """Open a corpus of the cache: that of its highly variable genes where these are asked for, made once too.

    Args:
        corpus: over all genes of the vocabulary.
        steps: of the preprocessing; the tokenizer does those that are not in the corpus.
        cache_dir: folder of the corpora.
        min_genes: cells with fewer expressed genes of the chosen ones are dropped.
        tokenizer: its options.
        arguments: further ones of `cell_loader`.
    """
    if steps.hvg is not None:
        whole, chosen = corpus, steps.hvg
        folder = cache_dir / narrowed_name(whole, chosen, min_genes)

        def narrow() -> None:
            narrow_corpus(whole, choose_genes(whole, chosen, say), folder, min_genes)

        corpus = made_once(folder, cache_dir, narrow, f"choosing genes of {whole.path}")
    options, notices = steps.tokenizer_options(tokenizer, corpus.manifest.value_kind)
    source = cell_loader(corpus.path, tokenizer=options, **arguments)
    notices = (*_what_was_dropped(corpus, min_genes), *notices)
    source.notices = [*(f"{corpus.path}: {notice}" for notice in notices), *source.notices]
    return source


def _what_was_dropped(corpus: CorpusInfo, min_genes: int) -> list[str]:
    """Say which part of the cells and of the counts of the files is not in the corpus, where any is."""
    manifest, genes = corpus.manifest, f"{len(corpus.gene_space):,} genes of the corpus"
    notices = []
    dropped = sum(source.cells_dropped for source in manifest.sources)
    if dropped:
        notices.append(
            f"{dropped:,} of {manifest.num_cells + dropped:,} cells dropped: they express fewer than min_genes "
            f"{min_genes} of the {genes}"
        )
    most = max(manifest.sources, key=lambda source: source.counts_dropped_fraction)
    if most.counts_dropped_fraction >= _WORTH_SAYING:
        what = "counts" if manifest.value_kind == "counts" else "values"
        many = len(manifest.sources) > 1
        where = f" of {most.path_name}, the most of {len(manifest.sources)} sources," if many else ""
        notices.append(
            f"{most.counts_dropped_fraction:.2%} of the {what}{where} dropped: on genes that are not of the {genes}"
        )
    return notices


def _needed(
    label: str | Sequence[str] | None, sampling: Mapping[str, Any] | None, steps: Preprocessing
) -> list[str | None]:
    """Return the obs columns that must be kept without being named."""
    column = sampling.get("column") if isinstance(sampling, Mapping) else None
    labels = [label] if isinstance(label, str) or label is None else list(label)
    return [*labels, column, None if steps.hvg is None else steps.hvg.batch_key]
