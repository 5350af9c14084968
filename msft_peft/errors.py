"""The exceptions of msft_peft; each is also the built-in kind that HF peft's callers catch in its place."""


class PeftError(Exception):
    """Root of every error that msft_peft raises on purpose."""


class PeftWarning(UserWarning):
    """A warning about something that the user can change."""


class ConfigError(PeftError, ValueError):
    """A config field has a value that makes no sense, or a config file cannot be read."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The targets of a config match nothing in the model (HF's name and kind)."""


class AdapterNameError(PeftError, ValueError):
    """An adapter name is taken, unknown, or cannot be one."""


class LoadError(PeftError, RuntimeError):
    """The tensors of an adapter file do not fit the model; the message lists every one of them."""


class MergeError(PeftError, ValueError):
    """An adapter cannot be merged, or merging it would write non-finite numbers."""


class HubError(PeftError, OSError):
    """The Hub said no, could not be reached, or sent or took a file in part only."""


class NoBaseModelError(PeftError, LookupError):
    """No library that is installed has the base model of an adapter; the message says which were asked."""
