"""Runtime support: devices, memory, compilation, text files, progress bars, errors."""
