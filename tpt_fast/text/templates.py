"""Templates of prompts: sentences with "{}" in the place of the class name."""

from __future__ import annotations

from collections.abc import Sequence

#: Names of lists that open_clip has: OpenAI's 80 for ImageNet, and the seven best of them.
LISTS = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}

Templates = str | Sequence[str] | None


def read_templates(templates: Templates) -> tuple[str, ...] | None:
    """The templates that are meant: a list, or the name of one of :data:`LISTS`; None stays None.

    Raises:
        TypeError: something else than strings.
        ValueError: an unknown name, an empty list, or a template without exactly one "{}".
    """
    if templates is None:
        return None
    if isinstance(templates, str):
        if templates not in LISTS:
            hint = "; one template is a list of one" if "{}" in templates else ""
            raise ValueError(f"templates: expected a list or one of {', '.join(LISTS)}, got {templates!r}{hint}")
        import open_clip

        return tuple(fill("{}") for fill in getattr(open_clip, LISTS[templates]))
    try:
        found = tuple(templates)
    except TypeError:
        raise TypeError(f"templates: expected a list of strings, got {type(templates).__name__}") from None
    if not found:
        raise ValueError("templates: expected one or more, got none")
    for i, each in enumerate(found):
        if not isinstance(each, str):
            raise TypeError(f"templates[{i}]: expected a string, got {type(each).__name__}")
        if each.count("{}") != 1:
            raise ValueError(f'templates[{i}]: expected "{{}}" once, for the class name, got {each!r}')
    return found
