"""The exceptions of MindPet's graph operations, under its names."""

from msft_peft.errors import PeftError


class MindPetError(PeftError):
    """Root of these."""


class UnexpectedError(MindPetError):
    """What MindPet makes of errors that it did not foresee."""


class FreezeListError(UnexpectedError, TypeError):
    """`include` or `exclude` is no list of strings: a TypeError in MindPet's documents, or this in its code."""


class FreezeModeError(MindPetError, ValueError):
    """`freeze_delta` knows no such algorithm."""


class FreezeArgumentError(MindPetError, ValueError):
    """Arguments that ask for nothing, or of which one is missing."""


class FreezeTypeError(MindPetError, TypeError):
    """An argument of the wrong type."""


class ReadYamlFileError(MindPetError):
    """A configuration file is missing, is a link, or is no YAML."""


class BrokenYamlError(ReadYamlFileError, UnexpectedError):
    """A configuration file is no YAML."""


class ModelConfigFreezeInfoError(MindPetError):
    """A configuration file does not say what to freeze."""


class AbsolutePathError(MindPetError):
    """A path that must be absolute is not."""


class LinkPathError(MindPetError):
    """A path is a symbolic link."""
