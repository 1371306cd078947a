"""What measures this project: tables and timings. Nothing here is part of the library."""
