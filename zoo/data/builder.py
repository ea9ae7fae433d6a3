"""The one tfds builder under every corpus of text files; ArrayRecord, never TensorFlow."""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging

from hackle.zoo.data.files import SPLITS, Corpus, SourceFile
from hackle.zoo.errors import UserError

# Read many records at once: one call into the reader per chunk, and memory stays bounded.
CHUNK = 256


class FilesConfig(tfds.core.BuilderConfig):
    """A builder config made of a listing. Its name holds the fingerprint, so that another folder
    content or another Python version is prepared into another directory."""

    def __init__(self, corpus: Corpus):
        super().__init__(name=corpus.key, description=f"{len(corpus.files)} files")
        self.corpus = corpus


class TextFiles(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Base builder: splits "train" and "validation", features `text` and `path`.

    Subclasses say what they are (`DESCRIPTION`, `LICENSE`); which files there are comes with
    `config=FilesConfig(corpus)`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    DESCRIPTION: ClassVar[str]
    LICENSE: ClassVar[str | None] = None

    # Nothing is downloaded. Without this tfds looks for a checksum file beside the class, for
    # which it needs a package that it does not depend on (importlib_resources).
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            license=self.LICENSE,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        corpus = self.builder_config.corpus
        return {name: self._generate_examples(corpus.split(name)) for name in SPLITS}

    def _generate_examples(self, files: Sequence[SourceFile]) -> Iterator[tuple[str, dict]]:
        for file in files:
            data = self.builder_config.corpus.read(file)
            yield file.path, {"text": data, "path": file.path}


def build(builder_class: type[TextFiles], corpus: Corpus, data_dir: Path) -> Path:
    """Prepares `corpus` under `data_dir` unless it is there already; returns its directory.

    tfds writes into a directory of another name and renames it at the end, so that an
    interrupted run leaves nothing that a later one would take for whole.

    Raises:
      UserError: `data_dir` can't be written.
    """
    folder = data_dir / builder_class.name / corpus.key / str(builder_class.VERSION)
    try:
        with _quiet():
            builder = builder_class(
                data_dir=data_dir, config=FilesConfig(corpus), file_format="array_record"
            )
            builder.download_and_prepare()
    except OSError as error:
        # Another process may have been first with the same directory; then it is there, whole.
        if not (folder / "dataset_info.json").exists():
            raise UserError(f"cannot write data folder {data_dir}: {error}") from None
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without tfds's banner, progress bars and warnings: the caller has one line of its own."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def read_texts(
    folder: Path, corpus: Corpus, split: str, chunk: int = CHUNK
) -> Iterator[list[tuple[str, str]]]:
    """Yields lists of (path, text) in stored order from a directory that `build` returned.

    Every record is checked against the listing.

    Raises:
      UserError: the stored records are not the listed files.
    """
    hashes: Mapping[str, str] = {file.path: file.sha256 for file in corpus.split(split)}
    source = tfds.builder_from_directory(folder).as_data_source(split=split)
    if len(source) != len(hashes):
        raise UserError(f"{folder} is damaged ({split} split); delete it and run again")
    for start in range(0, len(source), chunk):
        texts = []
        for record in source.__getitems__(list(range(start, min(start + chunk, len(source))))):
            path = record["path"].decode()
            if hashlib.sha256(record["text"]).hexdigest() != hashes.get(path):
                raise UserError(f"{folder} is damaged ({path}); delete it and run again")
            texts.append((path, record["text"].decode()))
        yield texts
