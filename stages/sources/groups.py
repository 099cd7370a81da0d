"""Groups: images that belong together (of a patient, a video, a burst) and must not be in two splits."""

import re
from collections import defaultdict
from dataclasses import replace

from stages.sources.candidates import SPLITS, Source, SourceError

EXAMPLES = 3


def group_by_pattern(source: Source, pattern: str) -> Source:
    """Give every image the group that a regular expression finds in its key.

    The group is what the first parentheses match, or the whole match where there are none. An image that does not
    match is a group of its own; how many these are is a remark.
    """
    expression = re.compile(pattern)
    found = [expression.search(one.key) for one in source.candidates]
    groups = [match and match[1 if expression.groups else 0] for match in found]
    candidates = [replace(one, group=group or None) for one, group in zip(source.candidates, groups, strict=True)]
    lone = [one.key for one in candidates if one.group is None]
    if len(lone) == len(candidates):
        raise SourceError(f"group_pattern {pattern!r} matches no image; the first is {candidates[0].key}")
    remarks = list(source.remarks)
    if lone:
        remarks.append(
            f"{len(lone):,} of {len(candidates):,} images do not match group_pattern and are groups of their own, the "
            f"first: {lone[0]}"
        )
    return replace(source, candidates=candidates, remarks=tuple(remarks))


def check_groups(source: Source, allow_in_splits: bool) -> Source:
    """Refuse, or remark where it is allowed, groups that are in two of the splits that the source gives.

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
        raise SourceError(f"{message}; draw the splits (`splits: drawn`), or say `allow_group_in_splits: true`")
    return replace(source, remarks=(*source.remarks, message))
