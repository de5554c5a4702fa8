"""Every error this library raises on purpose: what happened, the value, and how to mend it."""


class AmygdalaError(Exception):
    """Base class of all errors that amygdala raises on purpose."""


class CorpusError(AmygdalaError):
    """The corpus on disk cannot be used as it is."""


class ModelError(AmygdalaError):
    """A model, layer, dtype or device that was asked for cannot be had."""


class ArtefactError(AmygdalaError):
    """A file written by an earlier step is missing, damaged or does not fit."""


class NotebookError(AmygdalaError):
    """A notebook cannot be run, or a cell of it failed."""


class SteeringError(AmygdalaError):
    """A steering request names a concept, layer or strength that cannot be applied."""


class TrainingError(AmygdalaError):
    """Examples, settings or a saved state that nothing can be trained with."""


class CheckpointError(AmygdalaError):
    """A checkpoint folder, or what is to be written to it, is not what it must be."""


class LiveError(AmygdalaError):
    """The weights a server serves from cannot be shared, trained or read."""
