"""How a text and its instruction become the string the model reads."""

from __future__ import annotations

from dataclasses import dataclass

from genembed.errors import ConfigurationError


@dataclass(frozen=True)
class PromptTemplate:
    """A string with `{instruction}` before `{text}`, each exactly once.

    Without an instruction a text is read bare: no part of the template is added.
    """

    template: str

    def __post_init__(self) -> None:
        """Check that both fields are there, in order."""
        parts = (self.template.count("{instruction}"), self.template.count("{text}"))
        if parts != (1, 1) or self.template.index("{instruction}") > self.template.index("{text}"):
            raise ConfigurationError(f"template={self.template!r}: it must hold {{instruction}} and then {{text}}, each exactly once.")

    def around(self, instruction: str | None) -> tuple[str, str]:
        """Return what stands before and after the text."""
        if instruction is None:
            return "", ""
        # Two plain splits, not str.format: an instruction may itself hold braces.
        head, tail = self.template.split("{text}")
        return head.replace("{instruction}", instruction), tail

    def apply(self, text: str, instruction: str | None) -> str:
        """Return the string the model reads."""
        head, tail = self.around(instruction)
        return head + text + tail


GIRCSE_TEMPLATE = "Instruct: {instruction}\nQuery:{text}"
"""As the released GIRCSE code writes it: no space after the colon."""

LASER_TEMPLATE = "Instruct: {instruction}\nQuery: {text}"
"""As LaSER writes it: with a space after the colon."""
