"""The commands, one file each: ``add_flags`` and ``run``; ``main`` where they read their flags."""
