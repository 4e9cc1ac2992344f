//! The shapes that every kind and dtype is held at.

use super::case::Dtypes;

/// A shape with the reason it is there.
#[derive(Debug, Clone, Copy)]
pub struct GridShape {
    pub rows: usize,
    pub cols: usize,
    pub dtypes: &'static [Dtypes],
    pub why: &'static str,
}

const EVERY: &[Dtypes] = &Dtypes::ALL;
/// For the widest rows: the two ways to compute (in place, and through conversion), to keep the run short.
const TWO: &[Dtypes] = &[Dtypes::F32, Dtypes::BF16_F32];

/// Those of the table of speeds, for rows that only some kernels hold.
const THREE: &[Dtypes] = &[Dtypes::F32, Dtypes::BF16, Dtypes::BF16_F32];

const fn every(rows: usize, cols: usize, why: &'static str) -> GridShape {
    GridShape {
        rows,
        cols,
        dtypes: EVERY,
        why,
    }
}

const fn two(rows: usize, cols: usize, why: &'static str) -> GridShape {
    GridShape {
        rows,
        cols,
        dtypes: TWO,
        why,
    }
}

const fn three(rows: usize, cols: usize, why: &'static str) -> GridShape {
    GridShape {
        rows,
        cols,
        dtypes: THREE,
        why,
    }
}

/// The rows of few giant ones: x (16, 64, 256, 256) over (64, 256, 256). On the CPU, `GRID` has it reduced.
pub const GIANT_SHAPE: [usize; 4] = [16, 64, 256, 256];
pub const GIANT_NORMALIZED_DIMS: usize = 3;
pub const GIANT_DTYPES: [Dtypes; 2] = [Dtypes::F32, Dtypes::BF16];

pub const GRID: &[GridShape] = &[
    every(0, 8, "no rows: empty y and dx, dweight and dbias are zeros"),
    every(0, 4096, "no rows of a width that other kernels take"),
    every(3, 0, "no columns: nothing to normalise"),
    every(1, 1, "the smallest"),
    every(9, 1, "hidden size 1: y is the bias"),
    every(1, 2, "one row of the least width with a variance"),
    every(5, 2, "two columns"),
    every(9, 3, "odd, less than a vector"),
    every(7, 7, "one less than a vector of 8"),
    every(9, 8, "one vector of 8 halves"),
    every(8, 31, "one less than a warp"),
    every(9, 32, "a warp"),
    every(5, 33, "one more than a warp"),
    every(9, 63, "one less than two warps"),
    every(7, 64, "two warps"),
    every(4, 65, "one more than two warps"),
    every(5, 127, "one less than a warp of vectors of 4"),
    every(3, 128, "a warp of vectors of 4"),
    every(9, 129, "one more than a warp of vectors of 4"),
    every(
        6,
        255,
        "one less than a block of 256, and than a warp of vectors of 8",
    ),
    every(9, 256, "a block of 256"),
    every(2, 257, "one more than a block of 256; prime"),
    every(5, 511, "below 512"),
    every(9, 512, "512"),
    every(3, 513, "above 512"),
    every(8, 768, "GPT-2 small"),
    every(3, 769, "above GPT-2 small; prime"),
    every(7, 1000, "a multiple of 8 that is no power of two"),
    every(
        5,
        1023,
        "one less than a chunk of the CPU kernels, and than a full block",
    ),
    every(4, 1024, "a chunk, a full block"),
    every(6, 1025, "a chunk and one element"),
    every(3, 2047, "below 2048"),
    every(5, 2048, "2048"),
    every(2, 2049, "above 2048"),
    every(4, 3072, "three chunks"),
    every(3, 4001, "prime; no row but the first is aligned"),
    every(3, 4095, "below 4096"),
    every(9, 4096, "4096; more than the CPU runs serially"),
    every(2, 4097, "above 4096"),
    every(5, 5120, "Llama 13B"),
    every(3, 8191, "below 8192; prime"),
    every(4, 8192, "8192: the CPU's serial limit exactly"),
    every(5, 8193, "above 8192: beyond the CPU's serial limit"),
    every(3, 12288, "GPT-3"),
    every(2, 16383, "one less than two segments of the CPU kernels"),
    every(3, 16384, "two segments"),
    every(2, 16385, "two segments and one element"),
    every(3, 20000, "two segments and a part of one"),
    every(2, 32767, "below 32768"),
    every(1, 32768, "one row at the CPU's serial limit"),
    every(3, 32769, "above 32768"),
    every(2, 50257, "GPT-2's vocabulary; odd"),
    every(3, 65535, "one less than 2^16"),
    every(2, 65536, "2^16"),
    every(1, 65537, "one row over 2^16; prime"),
    two(3, 100003, "prime, wide; two dtypes, to keep the run short"),
    two(
        2,
        131072,
        "2^17, a long row; two dtypes, to keep the run short",
    ),
    two(1, 131073, "above 2^17; two dtypes, to keep the run short"),
    two(
        2,
        262144,
        "256K, a long row; two dtypes, to keep the run short",
    ),
    two(
        1,
        262147,
        "above 256K, odd; two dtypes, to keep the run short",
    ),
    two(
        2,
        1000003,
        "a million, prime; two dtypes, to keep the run short",
    ),
    two(
        3,
        1048583,
        "16 x 4194304 reduced for the CPU, odd; two dtypes, to keep the run short",
    ),
    // Aligned rows just past what an owner of a row holds on CUDA; powers of two above are the last ones held.
    every(3, 258, "f64: the first past a warp"),
    every(
        9,
        136,
        "the first past 32 vectors of f32, 16 of halves: forward of small calls and of larger",
    ),
    every(5, 264, "the same of 64, 32"),
    every(5, 520, "the same of 128, 64"),
    every(3, 776, "the same of 192, 96"),
    every(3, 1032, "the same of 256, 128"),
    every(3, 2056, "the same of 512, 256"),
    every(2, 4104, "the same of 1024, 512"),
    every(2, 3074, "f64: the first past a block, backward"),
    every(2, 4100, "f32: the first past a block, backward"),
    every(
        2,
        8200,
        "halves: the first past 14 warps of 2 vectors a thread, backward",
    ),
    every(2, 8456, "halves: the first past a block, backward"),
    every(2, 10240, "unaligned views: the last in a block, forward"),
    every(2, 10241, "unaligned: the first past a block, forward"),
    every(2, 16392, "the first past a block, forward"),
    // Rows that do not start on 16 bytes: the last and the first past an owner, in rows enough for all places that one can start at.
    every(19, 515, "f32, unaligned: the last of 128 vectors"),
    every(19, 517, "f32, unaligned: the first past them"),
    every(17, 519, "halves, unaligned: the last of 64 vectors"),
    every(33, 521, "halves, unaligned: the first past them"),
    every(17, 771, "f32, unaligned: the last in a warp, forward"),
    every(9, 773, "f32, unaligned: the first past it"),
    every(21, 775, "halves, unaligned: the last of 96 vectors"),
    every(21, 777, "halves, unaligned: the first past them"),
    every(
        9,
        1031,
        "halves, unaligned: the last in a warp; f32: the first past it, backward",
    ),
    every(11, 1033, "halves, unaligned: the first past it"),
    every(
        9,
        1543,
        "halves, unaligned: the last in two warps of 3 vectors a thread",
    ),
    every(9, 1545, "halves, unaligned: the first past them"),
    every(9, 4099, "f32, unaligned: the last in a block of 8 warps"),
    every(9, 4101, "f32, unaligned: the first past it"),
    every(9, 8199, "halves, unaligned: the last in a block of 8 warps"),
    every(9, 8201, "halves, unaligned: the first past it"),
    every(5, 12291, "f32, unaligned: the last of 6 vectors a thread"),
    every(5, 12293, "f32, unaligned: the first past them"),
    every(5, 16387, "f32, unaligned: the last in a block, forward"),
    every(5, 16389, "f32, unaligned: the first past it"),
    every(9, 16391, "halves, unaligned: the last in a block, forward"),
    every(9, 16393, "halves, unaligned: the first past it"),
    every(
        2,
        45060,
        "f32: the first past 8 blocks of 4 vectors a thread, backward",
    ),
    every(2, 65544, "f64: the first past a cluster"),
    three(
        2,
        131080,
        "halves: the first past 8 blocks of 4 vectors a thread, forward; three dtypes",
    ),
    three(
        2,
        135176,
        "the first past a cluster, backward; three dtypes",
    ),
    three(
        2,
        270344,
        "f32: the first past a cluster, forward; three dtypes",
    ),
    three(
        2,
        540680,
        "halves: the first past a cluster, forward; three dtypes",
    ),
    three(
        3,
        1081352,
        "the first past what the blocks of an H100 hold in registers and a ring; three dtypes",
    ),
    two(
        1401,
        4096,
        "rows enough for a persistent block to pass all its buffers; two dtypes, to keep the run short",
    ),
    two(
        170,
        65528,
        "rows enough for a cluster to pass all its buffers; two dtypes, to keep the run short",
    ),
    two(
        96,
        65529,
        "the same of rows that start in eight places; two dtypes, to keep the run short",
    ),
    two(
        24,
        262147,
        "rows that start in eight places, in groups of the grid; two dtypes, to keep the run short",
    ),
    every(1, 768, "one row of an ordinary width"),
    every(
        47,
        345,
        "ragged: neither rows nor columns are a multiple of anything",
    ),
    every(
        16,
        2048,
        "the last number of rows without partial sums over blocks of rows",
    ),
    every(33, 1024, "two blocks of rows, one of them longer"),
    every(31, 1021, "rows below two blocks of 16; prime"),
    every(257, 33, "many narrow rows, odd on both axes"),
    every(4099, 64, "many narrow rows; prime"),
    every(
        70001,
        8,
        "rows above 2^16, the limit of a grid's second axis",
    ),
    every(1031, 256, "blocks of rows on the CPU; prime"),
    every(521, 768, "a batch of GPT-2 rows; prime"),
    every(300, 1024, "a batch that no block size divides"),
    every(
        255,
        1024,
        "the most rows that the CPU's backward divides by columns",
    ),
    every(256, 1024, "the least that it divides by rows"),
    every(255, 1023, "few rows of less than a strip: by rows"),
    every(133, 4096, "rows: one more than an H100 has multiprocessors"),
    every(265, 2048, "rows: two waves of an H100 and one"),
    GridShape {
        rows: 256,
        cols: 33001,
        dtypes: &[Dtypes::F32],
        why: "many rows, which the CPU divides by rows, too wide for a copy of the weight; f32 alone, to keep the run short",
    },
];

/// The shapes that are held with `dtypes`. For runs in several processes, `LAYER_NORM_GRID=I/N` takes every Nth, from the Ith on, and
/// `LAYER_NORM_GRID_ELEMENTS=A..B` those of at least A and less than B elements.
pub fn grid(dtypes: Dtypes) -> impl Iterator<Item = &'static GridShape> {
    let (part, parts) = pair_from_env("LAYER_NORM_GRID", "/").unwrap_or((0, 1));
    let (least, end) = pair_from_env("LAYER_NORM_GRID_ELEMENTS", "..").unwrap_or((0, usize::MAX));
    GRID.iter()
        .filter(move |shape| shape.dtypes.contains(&dtypes))
        .filter(move |shape| (least..end).contains(&(shape.rows * shape.cols)))
        .skip(part)
        .step_by(parts)
}

/// Two numbers, the first below the second.
fn pair_from_env(variable: &str, separator: &str) -> Option<(usize, usize)> {
    let value = std::env::var(variable).ok()?;
    let pair = value
        .split_once(separator)
        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
        .filter(|(a, b)| a < b);
    Some(pair.unwrap_or_else(|| {
        panic!("{variable}: expected A{separator}B with A less than B, got `{value}`")
    }))
}

/// A test for each of `Dtypes::ALL`, which calls `$check` with them. In a module of its own where a file has more than one.
// Exported: the test binaries that do not use it would warn of it otherwise.
#[macro_export]
macro_rules! grid_tests {
    ($check:path) => {
        $crate::grid_tests! {
            $check:
            grid_equals_f64_for_f32 => F32,
            grid_equals_f64_for_f64 => F64,
            grid_equals_f64_for_f16 => F16,
            grid_equals_f64_for_bf16 => BF16,
            grid_equals_f64_for_f16_with_f32_weight_and_bias => F16_F32,
            grid_equals_f64_for_bf16_with_f32_weight_and_bias => BF16_F32,
        }
    };
    ($check:path: $($name:ident => $dtypes:ident,)*) => {$(
        #[test]
        fn $name() -> anyhow::Result<()> {
            $check($crate::common::case::Dtypes::$dtypes)
        }
    )*};
}
