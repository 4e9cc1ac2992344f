//! Whole runs, small.
