"""Stand-ins for what starts programs with a board: they do what is asked with files in $HOME, and record it there."""

from __future__ import annotations

CALLS = ".calls"
TABLE = ".table"

#: Enables units as the real one does; in $HOME/.no-systemd there is why it has no manager.
SYSTEMCTL = r"""#!/bin/sh
echo "systemctl $*" >> "$HOME/.calls"
if [ -f "$HOME/.no-systemd" ]; then cat "$HOME/.no-systemd" >&2; exit 1; fi
if [ "$2" = enable ]; then
  units="$HOME/.config/systemd/user"
  mkdir -p "$units/default.target.wants" && ln -sf "$units/$3" "$units/default.target.wants/$3"
fi
"""
#: In $HOME/.no-linger there is why a user may not linger.
LOGINCTL = r"""#!/bin/sh
echo "loginctl $*" >> "$HOME/.calls"
if [ -f "$HOME/.no-linger" ]; then cat "$HOME/.no-linger" >&2; exit 1; fi
"""
#: In $HOME/.no-cron there is why a user may not have a table.
CRONTAB = r"""#!/bin/sh
if [ -f "$HOME/.no-cron" ]; then cat "$HOME/.no-cron" >&2; exit 1; fi
case "$1" in
  -l) if [ -f "$HOME/.table" ]; then cat "$HOME/.table"; else echo "no crontab for pi" >&2; exit 1; fi ;;
  -r) rm "$HOME/.table" ;;
  -) cat > "$HOME/.table" ;;
esac
"""
PROGRAMS = {"systemctl": SYSTEMCTL, "loginctl": LOGINCTL, "crontab": CRONTAB}
