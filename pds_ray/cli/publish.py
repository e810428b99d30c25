"""The commands that give a distilled set away: export and push."""

from __future__ import annotations

import argparse

from pds_ray.cli.output import print_sizes, say
from pds_ray.store.storage import Folder


def export_set(args: argparse.Namespace) -> None:
    """Run `pds-ray export`."""
    from pds_ray.store.export import export

    manifest = export(args.set, args.format, args.out)
    size = sum(file["bytes"] for file in manifest["files"].values())
    say(f"{'pairs':<10} {manifest['pairs']:,} as {args.format}, {size:,} bytes")
    say(f"{'result':<10} {Folder(args.out).shown}")


def push_set(args: argparse.Namespace) -> None:
    """Run `pds-ray push`."""
    from pds_ray.store.publish import push

    url, sizes = push(
        args.set, args.to, args.format, args.private, args.revision, dry_run=args.dry_run
    )
    print_sizes(sizes)
    say(f"{'would be' if args.dry_run else 'result':<10} {url}")
