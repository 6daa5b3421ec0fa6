"""The subcommands of ``python -m timm_structdrop``, one file each: ``add_flags`` and ``run``."""
