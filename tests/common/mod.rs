//! What the tests share. One file a step:
//!
//! - `grid`: the shapes, each with the reason it is there.
//! - `data`: seeded random values, rounding to a dtype, tensors from values and back.
//! - `case`: one call of the op: kind, shape, dtypes, data; runs it and collects outputs and gradients.
//! - `oracle`: what the call should give, in f64 and plain loops.
//! - `compare`: the tolerance table and the one comparison.
//! - `devices`: the devices that every test runs on.

// Every test binary compiles this module and uses its own part of it.
#![allow(dead_code)]

pub mod case;
pub mod compare;
pub mod data;
pub mod devices;
pub mod grid;
pub mod oracle;
