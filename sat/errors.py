"""The errors that a user can act on. Each message says what is wrong, where, and how to mend it."""


class SatError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(SatError, ValueError):
    """A key, a value or a combination of values in a YAML file or on the command line is wrong."""


class DataError(SatError):
    """A clip, a caption or a manifest cannot be used."""


class CacheError(SatError):
    """A cache cannot be used: it is damaged, or it lacks what it should have."""


class CheckpointError(SatError):
    """A file or folder of weights or training state cannot be read, or does not fit the model."""


class LayoutError(SatError, ValueError):
    """The processes do not divide into the parallel layout that was asked for."""


class HookError(SatError, ValueError):
    """Two mixins claim the same hook, or a hook asks for something that the model does not hand out."""


class TrainingError(SatError):
    """Training cannot go on: its numbers are no longer finite."""


class DownloadError(SatError):
    """A file cannot be had from where it should be: the server fails, or what it sends is not the file."""


class SamplingError(SatError):
    """A sample cannot be made: its numbers are not finite."""


class CommunicationError(SatError):
    """Processes of the job have stopped hearing from each other, or never met."""
