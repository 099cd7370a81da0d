"""Groups: images that belong together (of a patient, a video, a burst) and must not be in two splits."""

import re
from collections import defaultdict
from dataclasses import replace

from stages.sources.candidates import SPLITS, Source, SourceError

EXAMPLES = 3


def group_by_pattern(source: Source, pattern: str) -> Source:
    """Give every image the group that a regular expression finds in its key.

    The group is what the first parentheses that take part in the match hold (of `p(.)|q(.)` either), or the whole
    match where there are none. An image that does not match, or whose match holds nothing there, is a group of its
    own; how many these are is a remark.

    Raises:
        SourceError: no image gets a group.
    """
    expression = re.compile(pattern)
    found = [expression.search(one.key) for one in source.candidates]
    candidates = [
        replace(one, group=match and _group(match)) for one, match in zip(source.candidates, found, strict=True)
    ]
    unmatched = [one.key for one, match in zip(candidates, found, strict=True) if match is None]
    empty = [one.key for one, match in zip(candidates, found, strict=True) if match and one.group is None]
    total = len(candidates)
    within = "its parentheses hold" if expression.groups else "the match holds"
    if len(unmatched) == total:
        raise SourceError(f"group_pattern {pattern!r} matches no image; the first is {candidates[0].key}")
    if len(unmatched) + len(empty) == total:
        raise SourceError(
            f"group_pattern {pattern!r} matches {len(empty):,} of {total:,} images, but {within} nothing in any of "
            f"them, the first: {empty[0]}; what names the group must not be optional"
        )
    remarks = list(source.remarks)
    if unmatched:
        remarks.append(
            f"{len(unmatched):,} of {total:,} images do not match group_pattern and are groups of their own, the "
            f"first: {unmatched[0]}"
        )
    if empty:
        remarks.append(
            f"{len(empty):,} of {total:,} images match group_pattern, but {within} nothing in them: they are groups of "
            f"their own, the first: {empty[0]}"
        )
    return replace(source, candidates=candidates, remarks=tuple(remarks))


def _group(match: re.Match[str]) -> str | None:
    """What the first parentheses that take part hold, or all of the match; None where that is nothing."""
    held = match.groups() or (match[0],)
    return next((one for one in held if one is not None), None) or None


def check_groups(source: Source, allow_in_splits: bool, advice: str) -> Source:
    """Refuse, or remark where it is allowed, groups that are in two of the splits that candidates have.

    Args:
        advice: against it, for the error.

    Raises:
        SourceError: names the first of them.
    """
    splits_of: dict[str, set[str]] = defaultdict(set)
    for one in source.candidates:
        if one.group is not None and one.split is not None:
            splits_of[one.group].add(one.split)
    torn = [(group, splits) for group, splits in splits_of.items() if len(splits) > 1]
    if not torn:
        return source
    examples = "; ".join(
        f"{group} ({', '.join(split for split in SPLITS if split in splits)})" for group, splits in torn[:EXAMPLES]
    )
    message = f"{len(torn):,} of {len(splits_of):,} groups are in more than one split: {examples}"
    if not allow_in_splits:
        raise SourceError(f"{message}; {advice}, or say `allow_group_in_splits: true`")
    return replace(source, remarks=(*source.remarks, message))
