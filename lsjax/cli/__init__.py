"""Command-line programs: each module holds one program's flags, main and console command."""
