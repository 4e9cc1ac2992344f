//! Which kernel runs, and on what grid: a pure function of the problem and the device, printable and comparable.
//!
//! | regime | who owns a row | reads of x |
//! |---|---|---|
//! | warp | a group of 4 to 32 lanes | 1 |
//! | block | a block, or a team of its warps | 1 |
//! | cluster | 2 to 16 blocks that share memory (compute capability 9.0 and later) | 1 |
//! | grid | 2 to 160 blocks that meet in global memory, all resident | 1 |
//! | strips | a team of a block's warps; other blocks own columns | 1, and 1 from L2 |
//! | split | all blocks, in two launches | 2 |
//!
//! [`FORWARD`] and [`BACKWARD`] mirror the kernels. A plan is the first of them that holds the row, unless a [`Choice`] names
//! another.

use crate::problem::Problem;
use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

const WARP: usize = 32;

/// What a plan needs to know of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may opt in to.
    pub shared_per_block: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_multiprocessor: usize,
    /// Bytes of the L2 cache.
    pub l2: usize,
    /// The most blocks of a cluster: 1 where there are none.
    pub max_cluster: usize,
    /// Whether blocks of a grid may wait for each other.
    pub cooperative: bool,
    /// The compute capability that the PTX in use was compiled for: 80 or 90.
    pub base: u32,
}

/// Who owns a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Regime {
    /// A group of lanes.
    Warp,
    /// A block, or a team of its warps.
    Block,
    /// A cluster of blocks.
    Cluster,
    /// A group of resident blocks.
    Grid,
    /// A team of a block's warps; other blocks of the launch own strips of columns, and sum over rows. Backward, of small tensors.
    Strips,
    /// All blocks, in two launches.
    Split,
}

/// One kernel launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's file, without `.cu`.
    pub file: &'static str,
    /// The kernel's name.
    pub entry: &'static str,
    /// Blocks, in x and y.
    pub grid: [u32; 2],
    /// Threads of a block, in x and y.
    pub block: [u32; 2],
    /// Blocks of a cluster; 1 if there are none.
    pub cluster: u32,
    /// Whether all blocks must be resident at once.
    pub cooperative: bool,
    /// Whether it may start before the launch that it follows has ended, for whose results it waits itself.
    pub early: bool,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// How a forward pass runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Who owns a row.
    pub regime: Regime,
    /// Blocks of a row, in the grid and split regimes.
    pub blocks: usize,
    /// In order; two in the split regime.
    pub launches: Vec<Launch>,
}

/// How a backward pass runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backward {
    /// Who owns a row.
    pub regime: Regime,
    /// Blocks of a row, in the grid and split regimes.
    pub blocks: usize,
    /// Teams of a block that own rows, in the block regime.
    pub teams: usize,
    /// Partial rows of dweight and of dbias.
    pub parts: usize,
    /// Sums behind each of them, in columns that moved out of reach of who had them (`Edges` of common.cuh).
    pub edges: usize,
    /// In order; two in the split regime.
    pub launches: Vec<Launch>,
    /// Adds the parts.
    pub finalize: Launch,
}

/// A kernel and how many warps, blocks and teams it is launched with: what a plan is made of, and what tuning chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The kernel's name, the first's in the split regime.
    pub entry: &'static str,
    /// Warps of a block that compute, of a team in the block regime of a backward pass.
    pub warps: usize,
    /// Blocks that own a row, or of the grid in the split regime; 1 in the warp and block regimes.
    pub blocks: usize,
}

/// What a kernel holds of a row, and how it may be launched.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    file: &'static str,
    entry: &'static str,
    /// The second launch of the split regime.
    second: &'static str,
    regime: Regime,
    /// How it reads tensors.
    access: Access,
    /// Whether it takes tensors that do not start on 16 bytes, unless it is of `Access::Wide`.
    skewed: bool,
    /// Bytes of an element of x for which it exists.
    sizes: &'static [usize],
    /// Lanes that own a row, in the warp regime.
    lanes: usize,
    /// Vectors of a row that a thread holds.
    per_thread: usize,
    /// Rows that a group of lanes or a block takes at once.
    rows: usize,
    /// Vectors of each tensor that a thread has in the ring.
    slots: usize,
    /// Vectors of bias that a thread has in slots beside the ring, for which registers are too few.
    bias_slots: usize,
    /// Warps that communicate beside those of a team or block that compute.
    communicating: usize,
    /// Warps of a block that compute, at most: by base 80 and 90. Of a team, where a block has several.
    most_warps: [usize; 2],
    /// Warps of its largest block of several teams, those that communicate too.
    team_warps: usize,
    /// Blocks that the registers of a multiprocessor hold.
    resident: usize,
    /// For calls whose blocks are all resident at once.
    small: bool,
    /// A block that owns a row has all of its warps.
    exact: bool,
    /// Bytes of an element of weight and bias for which it exists.
    param_sizes: &'static [usize],
    /// Blocks of a row for which it is meant, at least and at most.
    least_blocks: usize,
    most_blocks: usize,
}

/// The fields that most kernels share.
const KERNEL: Kernel = Kernel {
    file: "",
    entry: "",
    second: "",
    regime: Regime::Warp,
    access: Access::Wide,
    skewed: true,
    sizes: &[2, 4, 8],
    lanes: WARP,
    per_thread: 1,
    rows: 1,
    slots: 0,
    bias_slots: 0,
    communicating: 0,
    most_warps: [16, 16],
    team_warps: 0,
    resident: 1,
    small: false,
    exact: false,
    param_sizes: &[2, 4, 8],
    least_blocks: 0,
    most_blocks: usize::MAX,
};

/// The file of a kernel of forward.cu.
const fn forward_file(access: Access) -> &'static str {
    match access {
        Access::Wide => "forward",
        Access::Shifted | Access::Skewed => "forward_shifted",
        Access::Single => "forward_single",
    }
}

const fn forward_warp(
    entry: &'static str,
    access: Access,
    sizes: &'static [usize],
    lanes: usize,
    per_thread: usize,
    rows: usize,
) -> Kernel {
    Kernel {
        file: forward_file(access),
        entry,
        access,
        sizes,
        lanes,
        per_thread,
        rows,
        most_warps: [4, 4],
        ..KERNEL
    }
}

const fn forward_block(
    entry: &'static str,
    access: Access,
    sizes: &'static [usize],
    per_thread: usize,
    rows: usize,
    most_warps: [usize; 2],
) -> Kernel {
    Kernel {
        file: forward_file(access),
        entry,
        access,
        regime: Regime::Block,
        sizes,
        per_thread,
        rows,
        most_warps,
        ..KERNEL
    }
}

/// `kernel` of calls of one wave: blocks of it that a multiprocessor's registers hold.
const fn small(kernel: Kernel, resident: usize) -> Kernel {
    Kernel {
        resident,
        small: true,
        exact: true,
        ..kernel
    }
}

/// `kernel` of rows that take all of its warps, no fewer.
const fn exact(kernel: Kernel) -> Kernel {
    Kernel {
        exact: true,
        ..kernel
    }
}

/// `kernel` of tensors that start on 16 bytes.
const fn unskewed(kernel: Kernel) -> Kernel {
    Kernel {
        skewed: false,
        ..kernel
    }
}

/// `kernel` of weights in half precision alone.
const fn of_halves(kernel: Kernel) -> Kernel {
    Kernel {
        param_sizes: &[2],
        ..kernel
    }
}

/// `kernel` of f32 weights alone.
const fn of_f32(kernel: Kernel) -> Kernel {
    Kernel {
        param_sizes: &[4],
        ..kernel
    }
}

/// A kernel of forward_ring.cu or backward_ring.cu: vectors of a row that a thread holds, slots, warps that communicate.
const fn ring(
    file: &'static str,
    entry: &'static str,
    regime: Regime,
    sizes: &'static [usize],
    [per_thread, slots, communicating]: [usize; 3],
    most_warps: [usize; 2],
) -> Kernel {
    Kernel {
        file,
        entry,
        access: match file.as_bytes() {
            [.., b'r', b'i', b'n', b'g'] => Access::Wide,
            _ => Access::Shifted,
        },
        regime,
        sizes,
        per_thread,
        slots,
        communicating,
        most_warps,
        ..KERNEL
    }
}

/// A persistent warp kernel: lanes of a row, vectors of it that each holds, and rows in the ring; warps of a block, and blocks that registers hold.
const fn backward_warp(
    entry: &'static str,
    access: Access,
    sizes: &'static [usize],
    [lanes, per_thread, ring]: [usize; 3],
    [warps, resident]: [usize; 2],
) -> Kernel {
    Kernel {
        file: match access {
            Access::Wide => "backward",
            Access::Shifted | Access::Skewed => "backward_shifted",
            Access::Single => "backward_single",
        },
        entry,
        access,
        sizes,
        lanes,
        per_thread,
        slots: ring * per_thread,
        most_warps: [warps, warps],
        resident,
        ..KERNEL
    }
}

/// A kernel of backward_strips.cu: vectors of a row that a thread of its team holds.
const fn backward_strips(
    entry: &'static str,
    sizes: &'static [usize],
    per_thread: usize,
) -> Kernel {
    Kernel {
        file: "backward_strips",
        entry,
        regime: Regime::Strips,
        sizes,
        per_thread,
        most_warps: [STRIPS_THREADS / WARP, STRIPS_THREADS / WARP],
        ..KERNEL
    }
}

const fn split(
    file: &'static str,
    entry: &'static str,
    second: &'static str,
    access: Access,
) -> Kernel {
    Kernel {
        file,
        entry,
        second,
        regime: Regime::Split,
        access,
        ..KERNEL
    }
}

/// `kernel` of a file that is compiled with LN_ADD.
const fn adds(file: &'static str, kernel: Kernel) -> Kernel {
    Kernel { file, ..kernel }
}

/// Kernels of the forward pass, in the order in which a plan tries them. Shares of the roofline on an H200 beside each.
#[rustfmt::skip]
const FORWARD: &[Kernel] = &[
    forward_warp("forward_warp_wide_4x4x1", Access::Wide, &[2, 4, 8], 4, 4, 1),
    // Of one wave, us with kernels of their own and without: f32 4096 x 128 5.8, 6.1; 2048 x 256 6.2, 6.1 (5.6, 6.2); 1024 x 512 6.0, 6.1;
    // 2048 x 1024 8.5, 8.9; 256 x 2048 6.1, 6.3; 256 x 4096 7.3, 8.1. Halves 2048 x 256 5.5, 6.0; 2048 x 1024 7.3, 7.4; 512 x 2048 6.4, 7.1;
    // 512 x 4096 7.1, 8.0; 256 x 8192 7.6, 8.1. Of more waves the registers are missed: 16384 x 4096 83, 71. Weight and bias on their way with x,
    // which ptxas had undone in warps: 2048 x 256 in f32 5.9 for 6.2, 2048 x 1024 in bf16 6.9 for 7.1, 512 x 768 5.2 for 5.4. Timed so that each
    // call ends before the next: f32 2048 x 256 in 32 lanes 4.5, in 16 4.8; halves 2048 x 1024 in blocks 6.1, in a warp 6.2, 512 x 768 level.
    small(forward_warp("forward_warp_small_16x2x1", Access::Wide, &[2], 16, 2, 1), 7),
    small(forward_warp("forward_warp_small_32x2x1", Access::Wide, &[2], 32, 2, 1), 7),
    small(forward_block("forward_block_small_64x2x1", Access::Wide, &[2], 2, 1, [2, 2]), 16),
    small(forward_block("forward_block_small_64x4x1", Access::Wide, &[2], 4, 1, [2, 2]), 8),
    small(forward_block("forward_block_small_128x4x1", Access::Wide, &[2], 4, 1, [4, 4]), 4),
    small(forward_block("forward_block_small_256x4x1", Access::Wide, &[2], 4, 1, [8, 8]), 2),
    small(forward_warp("forward_warp_small_8x4x1", Access::Wide, &[4], 8, 4, 1), 7),
    small(forward_warp("forward_warp_small_32x2x1", Access::Wide, &[4], 32, 2, 1), 10),
    small(forward_warp("forward_warp_small_32x6x1", Access::Wide, &[4], 32, 6, 1), 4),
    small(forward_block("forward_block_small_64x4x1", Access::Wide, &[4], 4, 1, [2, 2]), 16),
    small(forward_block("forward_block_small_128x4x1", Access::Wide, &[4], 4, 1, [4, 4]), 8),
    small(forward_block("forward_block_small_256x4x1", Access::Wide, &[4], 4, 1, [8, 8]), 4),
    // 256 columns: bf16 92%, a row at a time 89%; f32 95%, a row at a time 93%, with 32 lanes 92%.
    forward_warp("forward_warp_wide_16x2x2", Access::Wide, &[2], 16, 2, 2),
    forward_warp("forward_warp_wide_16x4x2", Access::Wide, &[4], 16, 4, 2),
    // 512 columns of bf16: 91%, with 32 lanes 89%.
    forward_warp("forward_warp_wide_16x4x1", Access::Wide, &[2], 16, 4, 1),
    // 768, 1024 columns of bf16: 92%, 94%. 1536: 94% in blocks of 3 vectors a thread, in a warp of 6 92%.
    forward_warp("forward_warp_wide_32x3x1", Access::Wide, &[2], 32, 3, 1),
    of_halves(forward_warp("forward_warp_wide_32x4x1", Access::Wide, &[2], 32, 4, 1)),
    forward_warp("forward_warp_wide_32x4x1", Access::Wide, &[4, 8], 32, 4, 1),
    of_halves(forward_block("forward_block_wide_3x1", Access::Wide, &[2], 3, 1, [2, 2])),
    // f32 weights beside bf16, of 2 rows at a time and, in brackets, of one, us: 32768 x 1024 38.0 (40.7), 16384 x 1536 31.0 (32.4); x 4096 71.0 (70.1),
    // 8192 x 8192 77.7 (72.1; clusters 77.5).
    of_f32(forward_warp("forward_warp_wide_32x4x2", Access::Wide, &[2], 32, 4, 2)),
    of_f32(forward_block("forward_block_wide_3x2", Access::Wide, &[2], 3, 2, [2, 2])),
    // x loaded once and, in brackets, twice, us: bf16 at 2048, 4096, 8192 columns 36.7, 66.8, 67.9 (36.7, 67.6, 70.0); f32 at 1024, 2048, 4096
    // columns 68.3, 67.9, 128.9 (68.5, 68.5, 132.5), at 8192 133.9 (131.0). bf16 at 12288 and 16384 columns before L2 was told to keep x: 37.2,
    // 80.2 (31.3, 71.9).
    exact(forward_block("forward_block_wide_64x4x1", Access::Wide, &[2], 4, 1, [2, 2])),
    exact(forward_block("forward_block_wide_128x4x1", Access::Wide, &[2], 4, 1, [4, 4])),
    exact(forward_block("forward_block_wide_256x4x1", Access::Wide, &[2], 4, 1, [8, 8])),
    forward_block("forward_block_wide_4x1", Access::Wide, &[2, 4], 4, 1, [8, 8]),
    // f32 weights beside bf16, 4096 x 16384: 75.8 us, in blocks that load x twice 80.7.
    of_f32(ring("forward_ring", "forward_cluster_wide", Regime::Cluster, &[2], [4, 20, 1], [16, 16])),
    forward_block("forward_block_twice_4x1", Access::Wide, &[2], 4, 1, [32, 16]),
    forward_block("forward_block_twice_4x1", Access::Wide, &[4], 4, 1, [16, 16]),
    // Beyond 16 warps a block's rows wait for each other; without clusters there is no other way.
    forward_block("forward_block_wide_4x1", Access::Wide, &[8], 4, 1, [32, 16]),
    forward_block("forward_block_wide_8x1", Access::Wide, &[4], 8, 1, [32, 16]),
    forward_warp("forward_warp_single_4x8x1", Access::Single, &[2, 4, 8], 4, 8, 1),
    forward_warp("forward_warp_single_32x4x1", Access::Single, &[2, 4, 8], 32, 4, 1),
    // Shares at columns that no vector divides. bf16: 513 78%, a row at a time 72%; 769 81%, a row at a time 76%.
    forward_warp("forward_warp_shifted_32x2x2", Access::Shifted, &[2], 32, 2, 2),
    forward_warp("forward_warp_shifted_32x3x2", Access::Shifted, &[2], 32, 3, 2),
    of_halves(forward_warp("forward_warp_shifted_32x4x1", Access::Shifted, &[2], 32, 4, 1)),
    forward_warp("forward_warp_shifted_32x4x1", Access::Shifted, &[4, 8], 32, 4, 1),
    // 1537 columns of bf16: 84%, with 4 vectors a thread, before, 76%: of half the warps, half the vectors.
    of_halves(forward_block("forward_block_shifted_3x1", Access::Shifted, &[2], 3, 1, [2, 2])),
    // 769 columns of f32: 98%, in blocks 94%.
    forward_warp("forward_warp_shifted_32x6x2", Access::Shifted, &[4], 32, 6, 2),
    // f32 weights beside bf16, of 2 rows at a time and, in brackets, of one, us: 16384 x 1001 27.4 (31.8), x 1537 36 (42), 8192 x 4001 44.5 (54).
    of_f32(forward_warp("forward_warp_shifted_32x4x2", Access::Shifted, &[2], 32, 4, 2)),
    of_f32(forward_block("forward_block_shifted_3x2", Access::Shifted, &[2], 3, 2, [2, 2])),
    of_f32(forward_block("forward_block_shifted_4x2", Access::Shifted, &[2], 4, 2, [4, 4])),
    // 4001 columns: bf16 88%, f32 97%. 8191 columns of bf16, before: 88%, x loaded twice 84%; with f32 weights 8192 x 5121 60.3 us, twice 61.9.
    forward_block("forward_block_shifted_4x1", Access::Shifted, &[2, 4], 4, 1, [8, 8]),
    forward_block("forward_block_shifted_4x1", Access::Shifted, &[8], 4, 1, [32, 16]),
    // 2048 x 12289 in bf16: 35.4 us, in 4 vectors a thread of 512 41.8; x 20001 57, in clusters 53. Of x an element past 16 bytes 44.9, in clusters 39.7.
    unskewed(forward_block("forward_block_shiftedtwice_6x1", Access::Shifted, &[2], 6, 1, [32, 8])),
    // 12289 columns of f32: 92%, with 8 vectors a thread 85%.
    forward_block("forward_block_shifted_6x1", Access::Shifted, &[4], 6, 1, [16, 16]),
    forward_block("forward_block_shifted_8x1", Access::Shifted, &[4], 8, 1, [32, 16]),
    // us, clusters and, in brackets, a grid: f32 1024 x 33001 83 (85), x 50257 119 (117), 512 x 75001 97 (90), x 100003 118 (115); bf16 2048 x 20001 53
    // (58), 1024 x 33001 48 (52), x 50257 70 (67), 512 x 75001 59 (54), x 100003 69 (65); beside f32 1024 x 50257 92 (77), 512 x 100003 97 (74).
    Kernel { most_blocks: 8, ..ring("forward_ring_shifted", "forward_cluster_shifted", Regime::Cluster, &[4], [4, 16, 1], [16, 16]) },
    ring("forward_ring_shifted", "forward_grid_shifted", Regime::Grid, &[4], [4, 24, 4], [12, 16]),
    ring("forward_ring_shifted", "forward_cluster_shifted", Regime::Cluster, &[8], [4, 16, 1], [15, 15]),
    ring("forward_ring_shifted", "forward_grid_shifted", Regime::Grid, &[8], [4, 24, 4], [12, 12]),
    Kernel { least_blocks: 4, ..of_halves(ring("forward_ring_shifted", "forward_grid_shifted", Regime::Grid, &[2], [4, 24, 4], [12, 16])) },
    of_halves(ring("forward_ring_shifted", "forward_cluster_shifted", Regime::Cluster, &[2], [4, 16, 1], [16, 16])),
    of_halves(ring("forward_ring_shifted", "forward_grid_shifted", Regime::Grid, &[2], [4, 24, 4], [12, 16])),
    // f32 weights take registers.
    Kernel { least_blocks: 4, ..of_f32(ring("forward_ring_shifted", "forward_grid_shifted", Regime::Grid, &[2], [4, 24, 4], [8, 8])) },
    of_f32(ring("forward_ring_shifted", "forward_cluster_shifted", Regime::Cluster, &[2], [4, 16, 1], [11, 11])),
    of_f32(ring("forward_ring_shifted", "forward_grid_shifted", Regime::Grid, &[2], [4, 24, 4], [8, 8])),
    forward_warp("forward_warp_single_32x8x1", Access::Single, &[2, 4, 8], 32, 8, 1),
    forward_warp("forward_warp_single_32x16x1", Access::Single, &[2, 4], 32, 16, 1),
    forward_block("forward_block_single_16x1", Access::Single, &[2, 4], 16, 1, [16, 16]),
    forward_block("forward_block_single_8x1", Access::Single, &[8], 8, 1, [16, 16]),
    // bf16 at 65536, 131072 columns: 92.7%, 93.5%, with 12 vectors a thread 90.4%, 92.5%; at 262144 91.1% and 93.8%.
    Kernel { most_blocks: 8, ..ring("forward_ring", "forward_cluster_wide", Regime::Cluster, &[2], [4, 20, 1], [16, 16]) },
    ring("forward_ring", "forward_cluster_wide", Regime::Cluster, &[8], [4, 20, 1], [16, 16]),
    // f32 at 32768, 65536, 131072, 262144 columns: 94%, 97%, 97%, 96%, with 4 vectors a thread of 16 warps 92%, 96%, 93%, and a grid 91%.
    of_f32(ring("forward_ring", "forward_long_cluster_wide", Regime::Cluster, &[4], [12, 36, 1], [11, 11])),
    of_halves(ring("forward_ring", "forward_long_cluster_wide", Regime::Cluster, &[2], [12, 36, 1], [11, 11])),
    // 128 x 1048576 in f32, with a lead of 16, 18, 19 chunks: 91%, 93%, 94%; with 2 warps that communicate, where 4 had 89%, 83%.
    ring("forward_ring", "forward_grid_wide", Regime::Grid, &[2, 4, 8], [4, 24, 4], [16, 16]),
    // 16 x 4194304: bf16 85%, split 59%; f32 80%, with a lead of 34 chunks for 33 77%, split 60%.
    of_halves(ring("forward_ring", "forward_giant_wide", Regime::Grid, &[2], [12, 40, 1], [11, 11])),
    Kernel { bias_slots: 5, ..of_f32(ring("forward_ring", "forward_giant_wide", Regime::Grid, &[2], [12, 30, 1], [11, 11])) },
    Kernel { bias_slots: 4, ..ring("forward_ring", "forward_giant_wide", Regime::Grid, &[4], [23, 36, 1], [11, 11]) },
    split("split", "split_moments_wide", "split_normalize_wide", Access::Wide),
    split("split_single", "split_moments_single", "split_normalize_single", Access::Single),
];

/// Kernels of the backward pass, in the order in which a plan tries them.
#[rustfmt::skip]
const BACKWARD: &[Kernel] = &[
    // us, the persistent kernels and finalize in brackets: f32 64 x 256 5.4 (7.7), 512 x 768 7.7 (9.4), 1024 x 1024 10.5 (12.5), 128 x 4096 9.6
    // (11.5), 512 x 4096 15.7 (16.4); bf16 64 x 256 5.3 (7.2), 512 x 768 6.9 (8.7), 2048 x 1024 10.3 (12.4), 128 x 4096 8.6 (10.8).
    backward_strips("backward_strips_wide_2", &[2, 4, 8], 2),
    backward_strips("backward_strips_wide_4", &[4, 8], 4),
    // bf16: 83% at 256 and 512 columns, with 4 rows in the ring 81% and 82%; 768 86%, with 8 warps 83%; 1024 88%.
    backward_warp("backward_warp_wide_8x2", Access::Wide, &[2], [8, 2, 2], [8, 2]),
    backward_warp("backward_warp_wide_16x2", Access::Wide, &[2], [16, 2, 2], [8, 2]),
    backward_warp("backward_warp_wide_32x2", Access::Wide, &[2], [32, 2, 2], [8, 2]),
    backward_warp("backward_warp_wide_32x3", Access::Wide, &[2], [32, 3, 3], [12, 1]),
    backward_warp("backward_warp_wide_32x4", Access::Wide, &[2], [32, 4, 3], [8, 1]),
    // f32: 91% at 256 and 512 columns, with a block a multiprocessor 90%; 768 93%, with 8 warps 92%; 1024 92%.
    backward_warp("backward_warp_wide_8x4", Access::Wide, &[4], [8, 4, 3], [8, 2]),
    backward_warp("backward_warp_wide_16x4", Access::Wide, &[4], [16, 4, 3], [8, 2]),
    backward_warp("backward_warp_wide_32x4", Access::Wide, &[4], [32, 4, 3], [8, 2]),
    backward_warp("backward_warp_wide_32x6", Access::Wide, &[4], [32, 6, 3], [12, 1]),
    backward_warp("backward_warp_wide_32x8", Access::Wide, &[4], [32, 8, 3], [8, 1]),
    backward_warp("backward_warp_wide_8x4", Access::Wide, &[8], [8, 4, 4], [8, 1]),
    backward_warp("backward_warp_wide_32x4", Access::Wide, &[8], [32, 4, 4], [8, 1]),
    backward_warp("backward_warp_single_8x8", Access::Single, &[2, 4, 8], [8, 8, 4], [8, 1]),
    backward_warp("backward_warp_single_32x4", Access::Single, &[2, 4, 8], [32, 4, 4], [8, 1]),
    backward_warp("backward_warp_shifted_32x2", Access::Shifted, &[2], [32, 2, 3], [8, 2]),
    backward_warp("backward_warp_shifted_32x3", Access::Shifted, &[2], [32, 3, 3], [12, 1]),
    // Of x an element past 16 bytes, us, a warp's rows and, in brackets, a team's: bf16 16384 x 1001 43.6 (42.2), 32768 x 1024 71 (68); f32 72 (60), 124
    // (111).
    unskewed(backward_warp("backward_warp_shifted_32x4", Access::Shifted, &[2], [32, 4, 3], [8, 1])),
    backward_warp("backward_warp_shifted_32x4", Access::Shifted, &[4], [32, 4, 3], [8, 1]),
    backward_warp("backward_warp_shifted_32x4", Access::Shifted, &[8], [32, 4, 4], [8, 1]),
    backward_warp("backward_warp_shifted_32x6", Access::Shifted, &[4], [32, 6, 3], [8, 1]),
    unskewed(backward_warp("backward_warp_shifted_32x8", Access::Shifted, &[4], [32, 8, 3], [8, 1])),
    Kernel { team_warps: 20, ..ring("backward_ring_shifted", "backward_block_shifted", Regime::Block, &[2], [2, 6, 1], [16, 16]) },
    Kernel { team_warps: 20, ..ring("backward_ring_shifted", "backward_block_shifted", Regime::Block, &[4], [2, 8, 1], [16, 16]) },
    Kernel { team_warps: 12, ..ring("backward_ring_shifted", "backward_block_shifted", Regime::Block, &[8], [4, 12, 1], [11, 11]) },
    // bf16, us, clusters and, in brackets, a grid: 1024 x 50257 101 (102), 512 x 75001 88 (84), x 100003 106 (100).
    Kernel { most_blocks: 8, ..ring("backward_ring_shifted", "backward_cluster_shifted", Regime::Cluster, &[2], [2, 8, 1], [15, 15]) },
    ring("backward_ring_shifted", "backward_cluster_shifted", Regime::Cluster, &[4], [4, 16, 1], [11, 11]),
    ring("backward_ring_shifted", "backward_cluster_shifted", Regime::Cluster, &[8], [4, 12, 1], [11, 11]),
    ring("backward_ring_shifted", "backward_grid_shifted", Regime::Grid, &[2], [2, 12, 4], [12, 16]),
    ring("backward_ring_shifted", "backward_grid_shifted", Regime::Grid, &[4], [4, 12, 4], [8, 16]),
    ring("backward_ring_shifted", "backward_grid_shifted", Regime::Grid, &[8], [4, 12, 4], [8, 8]),
    backward_warp("backward_warp_single_32x8", Access::Single, &[2, 4, 8], [32, 8, 4], [8, 1]),
    backward_warp("backward_warp_single_32x16", Access::Single, &[2, 4], [32, 16, 4], [8, 1]),
    // bf16 at 2048 columns: 88% in 4 teams a block, 84% in 4 blocks, whose partial sums are 4 times as many. At 7168 and 8192 columns 89.3% and
    // 88.3%, with 3 vectors a thread 89.2% and 90.0%.
    Kernel { team_warps: 20, ..ring("backward_ring", "backward_block_wide", Regime::Block, &[2], [2, 6, 1], [14, 14]) },
    Kernel { team_warps: 12, ..ring("backward_ring", "backward_long_block_wide", Regime::Block, &[2], [3, 12, 1], [11, 11]) },
    // f32 at 4096 columns: 93%, with 4 vectors 92%.
    Kernel { team_warps: 20, ..ring("backward_ring", "backward_block_wide", Regime::Block, &[4], [2, 8, 1], [16, 16]) },
    Kernel { team_warps: 13, ..ring("backward_ring", "backward_block_wide", Regime::Block, &[8], [4, 12, 1], [12, 12]) },
    // bf16 at 16384, 32768, 65536, 131072 columns: 88%, 88%, 88%, 87%, with 2 vectors a thread of 16 warps 85%, 83%, 86%, 83%; f32 at 8192, 16384, 32768
    // columns: 93%, 93%, 93%, with 2 vectors of 16 warps 91%, 89%, 93%.
    ring("backward_ring", "backward_cluster_wide", Regime::Cluster, &[2], [3, 12, 1], [11, 11]),
    Kernel { most_blocks: 8, ..ring("backward_ring", "backward_cluster_wide", Regime::Cluster, &[4], [4, 16, 1], [11, 11]) },
    // f32 at 65536 and 131072 columns: 93%, 92%, in 16 blocks of 4 vectors a thread 92%, in a grid 90%.
    ring("backward_ring", "backward_long_cluster_wide", Regime::Cluster, &[4], [6, 18, 1], [11, 11]),
    ring("backward_ring", "backward_cluster_wide", Regime::Cluster, &[8], [4, 12, 1], [12, 12]),
    // 128 x 1048576: 79% in bf16, 85% in f32; with 2 warps that communicate 59% and 81%.
    ring("backward_ring", "backward_grid_wide", Regime::Grid, &[2], [2, 12, 4], [16, 16]),
    ring("backward_ring", "backward_grid_wide", Regime::Grid, &[4], [4, 12, 4], [8, 16]),
    ring("backward_ring", "backward_grid_wide", Regime::Grid, &[8], [4, 12, 4], [8, 8]),
    split("split", "split_sums_wide", "split_gradients_wide", Access::Wide),
    split("split_single", "split_sums_single", "split_gradients_single", Access::Single),
];

/// Kernels of the forward pass that add a residual.
#[rustfmt::skip]
const FORWARD_ADD: &[Kernel] = &[
    adds("forward_add", forward_warp("forward_warp_add_4x4x1", Access::Wide, &[2, 4, 8], 4, 4, 1)),
    adds("forward_add", forward_warp("forward_warp_add_16x2x1", Access::Wide, &[2, 4], 16, 2, 1)),
    adds("forward_add", forward_warp("forward_warp_add_32x2x1", Access::Wide, &[2, 4], 32, 2, 1)),
    adds("forward_add", forward_warp("forward_warp_add_32x3x1", Access::Wide, &[2], 32, 3, 1)),
    adds("forward_add", forward_warp("forward_warp_add_32x4x1", Access::Wide, &[8], 32, 4, 1)),
    adds("forward_add", forward_block("forward_block_add_2x1", Access::Wide, &[2, 4], 2, 1, [16, 16])),
    adds("forward_add", forward_block("forward_block_add_4x1", Access::Wide, &[4], 4, 1, [32, 32])),
    adds("forward_add", forward_block("forward_block_add_4x1", Access::Wide, &[2, 8], 4, 1, [16, 16])),
];

/// Kernels of the backward pass that take the gradient of the sum with a residual.
#[rustfmt::skip]
const BACKWARD_ADD: &[Kernel] = &[
    adds("backward_add", backward_warp("backward_warp_add_8x2", Access::Wide, &[2], [8, 2, 2], [8, 2])),
    adds("backward_add", backward_warp("backward_warp_add_16x2", Access::Wide, &[2], [16, 2, 2], [8, 2])),
    adds("backward_add", backward_warp("backward_warp_add_32x2", Access::Wide, &[2], [32, 2, 2], [8, 2])),
    adds("backward_add", backward_warp("backward_warp_add_32x3", Access::Wide, &[2], [32, 3, 3], [8, 1])),
    adds("backward_add", backward_warp("backward_warp_add_32x4", Access::Wide, &[2], [32, 4, 3], [8, 1])),
    adds("backward_add", backward_warp("backward_warp_add_8x4", Access::Wide, &[4], [8, 4, 3], [8, 1])),
    adds("backward_add", backward_warp("backward_warp_add_16x4", Access::Wide, &[4], [16, 4, 3], [8, 1])),
    adds("backward_add", backward_warp("backward_warp_add_32x4", Access::Wide, &[4], [32, 4, 3], [8, 1])),
    adds("backward_add", backward_warp("backward_warp_add_32x6", Access::Wide, &[4], [32, 6, 3], [8, 1])),
    adds("backward_add", backward_warp("backward_warp_add_8x4", Access::Wide, &[8], [8, 4, 4], [8, 1])),
    adds("backward_add", backward_warp("backward_warp_add_32x4", Access::Wide, &[8], [32, 4, 4], [8, 1])),
    adds("backward_ring_add", Kernel { team_warps: 20, ..ring("backward_ring", "backward_block_add", Regime::Block, &[2], [2, 6, 1], [16, 16]) }),
    adds("backward_ring_add", Kernel { team_warps: 20, ..ring("backward_ring", "backward_block_add", Regime::Block, &[4], [2, 8, 1], [16, 16]) }),
    adds("backward_ring_add", Kernel { team_warps: 13, ..ring("backward_ring", "backward_block_add", Regime::Block, &[8], [4, 12, 1], [12, 12]) }),
    adds("backward_ring_add", ring("backward_ring", "backward_cluster_add", Regime::Cluster, &[2], [3, 12, 1], [11, 11])),
    adds("backward_ring_add", ring("backward_ring", "backward_cluster_add", Regime::Cluster, &[4], [4, 16, 1], [11, 11])),
    adds("backward_ring_add", ring("backward_ring", "backward_cluster_add", Regime::Cluster, &[8], [4, 12, 1], [12, 12])),
];

/// Elements in a vector: 16 bytes, or one.
fn vector(problem: &Problem, access: Access) -> usize {
    match access {
        Access::Wide | Access::Shifted | Access::Skewed => 16 / problem.dtype.size_in_bytes(),
        Access::Single => 1,
    }
}

/// How kernels read tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// 16 bytes at a time: every row starts on 16 bytes.
    Wide,
    /// 16 bytes at a time: x and dy start on 16 bytes, their rows need not.
    Shifted,
    /// 16 bytes at a time, each from two: x and dy need not start on 16 bytes. By the kernels of `Shifted`, compiled for it.
    Skewed,
    /// An element at a time.
    Single,
}

impl Access {
    /// `xs_start`, `params_start`: whether x and dy, and weight and bias, start on 16 bytes.
    pub fn of(problem: &Problem, xs_start: bool, params_start: bool) -> Self {
        let rows_align = problem.cols.is_multiple_of(vector(problem, Self::Wide));
        match (xs_start, params_start && rows_align) {
            (true, true) => Self::Wide,
            (true, false) => Self::Shifted,
            (false, _) => Self::Skewed,
        }
    }

    /// Whether tensors that are read so may be read as `kernel` does.
    fn allows(self, kernel: Self) -> bool {
        match self {
            Self::Wide => kernel == Self::Wide,
            Self::Shifted | Self::Skewed => kernel != Self::Wide,
            Self::Single => kernel == Self::Single,
        }
    }
}

fn acc_bytes(problem: &Problem) -> usize {
    problem.stats_dtype().size_in_bytes()
}

/// The kernels index columns with 32 bits.
fn check_cols(problem: &Problem) -> Result<()> {
    if i32::try_from(problem.cols).is_err() {
        bail!(
            "{}: xs: expected rows of at most 2^31 - 1 columns on CUDA, got {}",
            problem.op_name(),
            problem.cols
        )
    }
    Ok(())
}

impl Launch {
    fn new(
        problem: &Problem,
        file: &'static str,
        entry: &'static str,
        grid: [usize; 2],
        block: [usize; 2],
    ) -> Result<Self> {
        // The driver's limits on a grid: 2^31 - 1 by 65535.
        let (Ok(x), Ok(y)) = (i32::try_from(grid[0]), u16::try_from(grid[1])) else {
            bail!(
                "{}: xs: expected no more than 2^31 - 1 blocks of work, got {} for {} rows of {} columns",
                problem.op_name(),
                grid[0].saturating_mul(grid[1]),
                problem.rows,
                problem.cols
            )
        };
        Ok(Self {
            file,
            entry,
            grid: [x as u32, u32::from(y)],
            block: [block[0] as u32, block[1] as u32],
            cluster: 1,
            cooperative: false,
            early: false,
            shared: 0,
        })
    }
}

/// What the driver reserves of each block's shared memory.
const RESERVED_SHARED: usize = 1024;
/// kMaxGroup and kToldStride of ring.cuh.
const MAX_GROUP: usize = 160;
const TOLD_STRIDE: usize = 8;
/// kRows and kThreads of split.cu.
const SPLIT_ROWS: usize = 16;
const SPLIT_THREADS: usize = 256;
/// kThreads of finalize.cu, and how many of them share a column's parts at most.
const FINALIZE_THREADS: usize = 256;
const FINALIZE_SPLITS: usize = 32;
/// kMaxTeams of backward_ring.cu.
const MAX_TEAMS: usize = 8;
/// kThreads and kStripLanes of backward_strips.cu.
const STRIPS_THREADS: usize = 256;
const STRIP_LANES: usize = 2;
/// Rows to which a strip of columns is summed in no more time than the rows take: 4096 x 256 in f32 12.5 us, persistent warps and finalize
/// 11.4; in bf16 11.3 and 9.9.
const STRIPS_ROWS: usize = 2048;

/// Where rows are few, the blocks of persistent warps have so many, or as many as spread the rows over all multiprocessors.
const FEW_WARPS: usize = 8;

fn gcd(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        b => gcd(b, a % b),
    }
}

/// Clusters that are resident at once, one block a multiprocessor. A cluster lies within a group of multiprocessors, some
/// of which remain over: on an H200 with 132, 66 of 2, 30 of 4, 15 of 8 and 7 of 16 were resident.
fn clusters(device: &DeviceFacts, blocks: usize) -> usize {
    let usable = match blocks {
        1 | 2 => device.multiprocessors,
        16.. => device.multiprocessors * 7 / 8,
        _ => device.multiprocessors * 10 / 11,
    };
    (usable / blocks).max(1)
}

/// A problem on a device, in one direction.
struct Planner<'a> {
    problem: &'a Problem,
    access: Access,
    device: &'a DeviceFacts,
    /// Tensors that pass through the ring: x, or x and dy.
    tensors: usize,
    /// Whether there is a residual to be added.
    adds: bool,
}

impl<'a> Planner<'a> {
    fn forward_of(problem: &'a Problem, access: Access, device: &'a DeviceFacts) -> Self {
        Self {
            problem,
            access,
            device,
            tensors: 1,
            adds: false,
        }
    }

    fn backward_of(problem: &'a Problem, access: Access, device: &'a DeviceFacts) -> Self {
        Self {
            tensors: 2,
            ..Self::forward_of(problem, access, device)
        }
    }

    fn size(&self) -> usize {
        self.problem.dtype.size_in_bytes()
    }

    /// Whole vectors of a row, the most that one has. What is before and behind them, of rows that do not start on 16 bytes, needs no room.
    fn vectors(&self, kernel: &Kernel) -> usize {
        self.problem.cols / vector(self.problem, kernel.access)
    }

    /// The distance of rows that start equally far from 16 bytes.
    fn period(&self, kernel: &Kernel) -> usize {
        match kernel.access {
            Access::Shifted => {
                let vector = vector(self.problem, kernel.access);
                vector / gcd(vector, self.problem.cols)
            }
            Access::Wide | Access::Skewed | Access::Single => 1,
        }
    }

    /// The file of the kernel that reads these tensors.
    fn file(&self, kernel: &Kernel) -> &'static str {
        match (self.access, kernel.file) {
            (Access::Skewed, "forward_shifted") => "forward_skewed",
            (Access::Skewed, "forward_ring_shifted") => "forward_ring_skewed",
            (Access::Skewed, "backward_shifted") => "backward_skewed",
            (Access::Skewed, "backward_ring_shifted") => "backward_ring_skewed",
            (_, file) => file,
        }
    }

    fn kernels(&self) -> impl Iterator<Item = &'static Kernel> {
        let table = match (self.tensors, self.adds) {
            (1, false) => FORWARD,
            (1, true) => FORWARD_ADD,
            (_, false) => BACKWARD,
            (_, true) => BACKWARD_ADD,
        };
        let (access, size) = (self.access, self.size());
        let param_size = self.problem.param_dtype.size_in_bytes();
        table
            .iter()
            .filter(move |k| access.allows(k.access) && (k.skewed || access != Access::Skewed))
            .filter(move |k| k.sizes.contains(&size) && k.param_sizes.contains(&param_size))
    }

    /// Bytes of the ring of one warp.
    fn warp_shared(&self, kernel: &Kernel) -> usize {
        let lane = kernel.slots * self.tensors * self.size()
            + kernel.bias_slots * self.problem.param_dtype.size_in_bytes();
        // Behind each chunk of a tensor, the vector that its last one spans besides.
        let spanned = match (self.access, kernel.access) {
            (Access::Skewed, Access::Shifted) => kernel.slots * self.tensors * 16,
            _ => 0,
        };
        lane * WARP * vector(self.problem, kernel.access) + spanned
    }

    /// What a ring's kernel uses of shared memory besides the ring, at most: a `MailBox`, one a team, with twice the sets in grids, where outer columns
    /// of several communication warps come too.
    fn static_shared(&self, kernel: &Kernel) -> usize {
        let of_f32 = match kernel.regime {
            Regime::Block => 9728,
            Regime::Grid => 4352,
            _ => 2176,
        };
        of_f32 * acc_bytes(self.problem) / 4
    }

    /// Warps of a block of this kernel that compute, at most.
    fn most_warps(&self, kernel: &Kernel) -> usize {
        let by_registers = kernel.most_warps[usize::from(self.device.base >= 90)];
        match self.warp_shared(kernel) {
            0 => by_registers,
            shared => by_registers.min(
                self.device
                    .shared_per_block
                    .saturating_sub(self.static_shared(kernel))
                    / shared,
            ),
        }
    }

    /// Warps of one of `blocks` blocks that share a row.
    fn warps_for(&self, kernel: &Kernel, blocks: usize) -> usize {
        let least = if kernel.exact {
            self.most_warps(kernel)
        } else {
            1
        };
        self.warps_of_row(kernel, blocks).max(least)
    }

    /// Those of them that hold a part of it: whole chunks of 32 vectors each.
    fn warps_of_row(&self, kernel: &Kernel, blocks: usize) -> usize {
        self.vectors(kernel)
            .div_ceil(blocks)
            .div_ceil(WARP)
            .div_ceil(kernel.per_thread)
    }

    /// Blocks of a forward launch whose lanes, or blocks, take rows once.
    fn row_blocks(&self, kernel: &Kernel, warps: usize) -> usize {
        // Rows that lanes take together start equally far from 16 bytes.
        let apart = match kernel.access {
            Access::Shifted if kernel.rows > 1 => vector(self.problem, kernel.access),
            _ => 1,
        };
        let groups = self.problem.rows.div_ceil(kernel.rows * apart) * apart;
        match kernel.regime {
            Regime::Warp => groups.div_ceil(warps * WARP / kernel.lanes),
            _ => groups,
        }
    }

    /// What of this problem is more than strips take, their limit, and how much it is. Blocks that own columns and blocks that own rows read x and dy
    /// both, once from memory as long as these are a third of L2 at most: 8 MiB a tensor on an H200. 2048 x 1024 in f32, 8 MiB, 15.6 us, persistent
    /// warps 15.2; 1024 x 2048 15.6, 15.8.
    fn too_much_for_strips(&self) -> Option<(&'static str, usize, usize)> {
        let Problem { rows, cols, .. } = *self.problem;
        let read = (rows * cols).saturating_mul(self.tensors * self.size());
        [
            ("rows", STRIPS_ROWS, rows),
            ("bytes of x and dy", self.device.l2 / 3, read),
        ]
        .into_iter()
        .find(|&(_, limit, got)| got > limit)
    }

    /// How the kernel holds the row, with as few blocks as do.
    fn choose(&self, kernel: &Kernel) -> Option<Choice> {
        let choice = |warps, blocks| {
            Some(Choice {
                entry: kernel.entry,
                warps,
                blocks,
            })
        };
        let most = self.most_warps(kernel);
        let most_vectors = kernel.lanes * kernel.per_thread;
        if kernel.regime == Regime::Warp && (most == 0 || self.vectors(kernel) > most_vectors) {
            return None;
        }
        let at_once = kernel.resident * self.device.multiprocessors;
        if kernel.small && self.row_blocks(kernel, most) > at_once {
            return None;
        }
        match kernel.regime {
            Regime::Warp => {
                // 512 x 768 in bf16: 8 warps a block 7.9 us, 12 warps 8.9.
                let each = self
                    .problem
                    .rows
                    .div_ceil(WARP / kernel.lanes)
                    .div_ceil(self.device.multiprocessors);
                let warps = if kernel.slots > 0 {
                    each.max(FEW_WARPS).min(most)
                } else {
                    most
                };
                choice(warps, 1)
            }
            Regime::Block => {
                let warps = self.warps_for(kernel, 1);
                let idle = warps - self.warps_of_row(kernel, 1);
                let fits = warps <= most
                    && (kernel.small || idle == 0)
                    && self.owners(kernel, warps, 1, 1).is_some();
                if fits { choice(warps, 1) } else { None }
            }
            Regime::Cluster => {
                let fits = |blocks| {
                    let warps = self.warps_for(kernel, blocks);
                    let fits = blocks <= self.device.max_cluster
                        && warps <= most
                        && self.owners(kernel, warps, blocks, 1).is_some();
                    fits.then_some((warps, blocks))
                };
                let fewest = [2, 4, 8, 16]
                    .into_iter()
                    .filter(|&blocks| blocks <= kernel.most_blocks)
                    .find_map(fits)?;
                // A block of 6 or 8 warps is alone on a multiprocessor, where three of half as many are not. Backward of halves, us: 4096 x 16001 139 in
                // 4 blocks of 8 warps, 122 in 8 of 4; 2048 x 32001 141, 128; 8192 x 8960 133 in 2 of 6, 121 in 4 of 3; 4096 x 17024 134, 119;
                // 2048 x 33856 135, 125; with idle warps 8192 x 8601 140 in 2 of 9, 146 in 4 of 5. f32 level: 8192 x 6080 153.5, 155.3, x 5313
                // 150.2, 145.5.
                let at_once = |(warps, _)| self.blocks_at_once(kernel, warps, 1) * warps;
                let halved = fits(2 * fewest.1).filter(|&halved| {
                    self.tensors > 1
                        && self.size() == 2
                        && 2 * halved.0 == fewest.0
                        && 3 * at_once(halved) >= 4 * at_once(fewest)
                });
                let (warps, blocks) = halved.unwrap_or(fewest);
                choice(warps, blocks)
            }
            Regime::Grid => {
                if !self.device.cooperative || most == 0 {
                    return None;
                }
                let least = self
                    .vectors(kernel)
                    .div_ceil(most * WARP * kernel.per_thread)
                    .max(2);
                let multiprocessors = self.device.multiprocessors;
                let limit = multiprocessors.min(MAX_GROUP);
                if least > limit || least < kernel.least_blocks {
                    return None;
                }
                let most_groups = (multiprocessors / least).min(self.problem.rows);
                // Groups whose rows all start alike change nothing, and are worth having fewer, of more blocks.
                let alike = self.alike(kernel, most_groups);
                let groups = if alike * 5 >= most_groups * 3 {
                    alike
                } else {
                    most_groups
                };
                let widest = (multiprocessors / groups).min(limit);
                // Equal parts on nine tenths of the multiprocessors, or all of these. us: 64 x 1000003 in bf16 89 forward and 153 backward with the
                // fewest blocks, 82 and 146 with all; 128 x 1048576 in f32 backward 430 in 128 equal parts, 441 with all; 16 x 4194304 in bf16
                // 78.4 in 128, 79.9 with the fewest and 79.8 with all.
                let chunks = self.vectors(kernel).div_ceil(WARP);
                let blocks = (least..=widest)
                    .filter(|blocks| groups * blocks * 10 >= multiprocessors * 9)
                    .find(|&blocks| chunks.is_multiple_of(blocks))
                    .unwrap_or(widest);
                choice(self.warps_for(kernel, blocks), blocks)
            }
            Regime::Strips => {
                let warps = self.warps_for(kernel, 1);
                let fits = warps <= most && self.too_much_for_strips().is_none();
                if fits { choice(warps, 1) } else { None }
            }
            Regime::Split => choice(
                SPLIT_THREADS / WARP,
                // 16 x 4194304: forward 221 us with two blocks a multiprocessor, 244, 245, 235 with 1, 3, 4; backward 344 us in f32 and 178
                // in bf16 with two, 342 and 185, 362 and 186 with 1, 3.
                (2 * self.device.multiprocessors).min(self.most_split_blocks(kernel)),
            ),
        }
    }

    /// The first kernel that holds the row.
    fn first(&self) -> Option<(&'static Kernel, Choice)> {
        self.kernels().find_map(|k| Some((k, self.choose(k)?)))
    }

    fn default(&self) -> Result<(&'static Kernel, Choice)> {
        match self.first() {
            Some(found) => Ok(found),
            None => bail!(
                "{}: no kernel for {:?} on {:?}",
                self.problem.op_name(),
                self.problem,
                self.device
            ),
        }
    }

    /// Every kernel that holds the row, as few ways as are worth a measurement.
    fn candidates(&self) -> Vec<(&'static Kernel, Choice)> {
        let mut found = Vec::new();
        for kernel in self.kernels() {
            let Some(choice) = self.choose(kernel) else {
                continue;
            };
            found.push((kernel, choice));
            let other: &[usize] = match kernel.regime {
                Regime::Cluster => &[2, 4, 8, 16],
                Regime::Grid => &[4, 8, 16, 33, 66, 132],
                Regime::Split => &[
                    self.device.multiprocessors,
                    2 * self.device.multiprocessors,
                    3 * self.device.multiprocessors,
                    4 * self.device.multiprocessors,
                ],
                _ => &[],
            };
            for &blocks in other {
                let warps = if kernel.regime == Regime::Split {
                    choice.warps
                } else {
                    self.warps_for(kernel, blocks)
                };
                let other = Choice {
                    warps,
                    blocks,
                    ..choice
                };
                if other != choice && self.check(kernel, &other).is_ok() {
                    found.push((kernel, other));
                }
            }
        }
        found
    }

    /// The candidates as plain choices, the built-in one first.
    fn choices(&self) -> Result<Vec<Choice>> {
        check_cols(self.problem)?;
        let mut choices = vec![self.default()?.1];
        for (_, choice) in self.candidates() {
            // A kernel may stand at several places of the table.
            if !choices.contains(&choice) {
                choices.push(choice);
            }
        }
        Ok(choices)
    }

    /// Blocks across the columns in the split regime: each has vectors to read, and their number times the threads of a block
    /// stays within the kernels' 32 bits.
    fn most_split_blocks(&self, kernel: &Kernel) -> usize {
        self.vectors(kernel)
            .div_ceil(SPLIT_THREADS)
            .min(16 * self.device.multiprocessors)
    }

    /// A choice that this problem on this device cannot take, and why.
    fn check(&self, kernel: &Kernel, choice: &Choice) -> std::result::Result<(), String> {
        let Choice { warps, blocks, .. } = *choice;
        let most = self.most_warps(kernel);
        let wrong = |what: &str, limit: usize, got: usize| {
            Err(format!("expected {what} to {limit}, got {got}"))
        };
        if kernel.regime == Regime::Strips
            && let Some((what, limit, got)) = self.too_much_for_strips()
        {
            return wrong(what, limit, got);
        }
        match kernel.regime {
            Regime::Cluster
                if !blocks.is_power_of_two() || blocks < 2 || blocks > self.device.max_cluster =>
            {
                return wrong(
                    "a cluster of 2, 4, .. blocks",
                    self.device.max_cluster,
                    blocks,
                );
            }
            Regime::Grid
                if !self.device.cooperative
                    || blocks < 2
                    || blocks > self.device.multiprocessors.min(MAX_GROUP) =>
            {
                return wrong(
                    "a group of 2 .. blocks",
                    self.device.multiprocessors.min(MAX_GROUP),
                    blocks,
                );
            }
            Regime::Split if blocks == 0 || blocks > self.most_split_blocks(kernel) => {
                return wrong("blocks", self.most_split_blocks(kernel), blocks);
            }
            Regime::Warp | Regime::Block | Regime::Strips if blocks != 1 => {
                return wrong("blocks", 1, blocks);
            }
            _ => {}
        }
        if kernel.regime != Regime::Split {
            let threads = match kernel.regime {
                Regime::Warp => kernel.lanes,
                _ => blocks * most * WARP,
            };
            let vectors = threads * kernel.per_thread;
            if self.vectors(kernel) > vectors {
                let columns = vectors * vector(self.problem, kernel.access);
                return wrong("columns", columns, self.problem.cols);
            }
            let least = match kernel.regime {
                // Only persistent warps count those beside them.
                Regime::Warp if kernel.slots > 0 => 1,
                Regime::Warp => most,
                _ => self.warps_for(kernel, blocks),
            };
            if warps < least {
                return Err(format!("expected {least} warps or more, got {warps}"));
            }
            if warps > most {
                return wrong("warps", most, warps);
            }
        }
        if matches!(
            kernel.regime,
            Regime::Block | Regime::Cluster | Regime::Grid
        ) && self.owners(kernel, warps, blocks, 1).is_none()
        {
            return Err(format!(
                "expected {} or more owners of rows, which start in so many ways, got fewer",
                self.period(kernel)
            ));
        }
        Ok(())
    }

    fn find(&self, choice: &Choice) -> Result<&'static Kernel> {
        let op = self.problem.op_name();
        let Some(kernel) = self.kernels().find(|k| k.entry == choice.entry) else {
            bail!(
                "{op}: tuning: no kernel `{}` for {} of {} columns",
                choice.entry,
                self.problem.dtype.as_str(),
                self.problem.cols
            )
        };
        match self.check(kernel, choice) {
            Ok(()) => Ok(kernel),
            Err(why) => bail!("{op}: tuning: `{}`: {why}", choice.entry),
        }
    }

    fn forward(&self, kernel: &Kernel, choice: &Choice) -> Result<Forward> {
        let (problem, Choice { warps, blocks, .. }) = (self.problem, *choice);
        let launch = |entry, grid, threads| {
            Launch::new(problem, self.file(kernel), entry, grid, [threads, 1])
        };
        let plan = |launches| Forward {
            regime: kernel.regime,
            blocks,
            launches,
        };
        match kernel.regime {
            Regime::Warp | Regime::Block => {
                let grid = [self.row_blocks(kernel, warps), 1];
                Ok(plan(vec![Launch {
                    // The driver queues it in 0.6 us less, of 4: a small call is over sooner than that.
                    early: self.device.base >= 90,
                    ..launch(kernel.entry, grid, warps * WARP)?
                }]))
            }
            Regime::Cluster | Regime::Grid => Ok(plan(vec![self.ring(kernel, choice, 1)?.0])),
            Regime::Strips => bail!(
                "{}: {} is a kernel of the backward pass",
                problem.op_name(),
                kernel.entry
            ),
            Regime::Split => {
                let grid = [problem.rows.div_ceil(SPLIT_ROWS), blocks];
                Ok(plan(vec![
                    launch(kernel.entry, grid, SPLIT_THREADS)?,
                    launch(kernel.second, grid, SPLIT_THREADS)?,
                ]))
            }
        }
    }

    /// Bytes of shared memory of a block.
    fn shared(&self, kernel: &Kernel, warps: usize, teams: usize) -> usize {
        let sums = match teams {
            1 => 0,
            teams => 2 * teams * part_step(self.problem) * acc_bytes(self.problem),
        };
        (teams * warps * self.warp_shared(kernel)).max(sums)
    }

    /// Blocks of a ring's kernel on a multiprocessor: those of few warps share it.
    fn blocks_at_once(&self, kernel: &Kernel, warps: usize, teams: usize) -> usize {
        let shared = self.shared(kernel, warps, teams);
        // Registers are dealt out to warps by fours, for the largest block.
        let most = kernel.most_warps[usize::from(self.device.base >= 90)];
        let most = (most + kernel.communicating)
            .max(kernel.team_warps)
            .next_multiple_of(4);
        let by_registers = most / (teams * (warps + kernel.communicating));
        let by_shared = self.device.shared_per_multiprocessor
            / (shared + self.static_shared(kernel) + RESERVED_SHARED);
        by_registers.min(by_shared).max(1)
    }

    /// Owners of rows that are resident at once, teams not counted; none if blocks or teams would have rows of several shifts.
    fn owners(&self, kernel: &Kernel, warps: usize, blocks: usize, teams: usize) -> Option<usize> {
        // Without a ring, a block takes rows once.
        if kernel.slots == 0 {
            return Some(self.problem.rows);
        }
        let resident = match kernel.regime {
            Regime::Grid => self.device.multiprocessors / blocks,
            _ => self.blocks_at_once(kernel, warps, teams) * clusters(self.device, blocks),
        };
        let rows = self.problem.rows.div_ceil(teams);
        if resident >= rows {
            return Some(rows);
        }
        match kernel.regime {
            Regime::Block => {
                let step = self.period(kernel) / gcd(self.period(kernel), teams);
                Some(resident / step * step).filter(|&owners| owners > 0)
            }
            // Owners whose rows all start alike change nothing: fewer of them, where they have no more rows for it.
            _ => {
                let alike = self.alike(kernel, resident);
                let no_more = alike > 0 && rows.div_ceil(alike) == rows.div_ceil(resident);
                Some(if no_more { alike } else { resident })
            }
        }
    }

    /// As many of `owners`, or none, that the rows of each, so many apart, start equally far from 16 bytes.
    fn alike(&self, kernel: &Kernel, owners: usize) -> usize {
        owners / self.period(kernel) * self.period(kernel)
    }

    /// Sums behind a partial row of dweight or of dbias, of an owner whose rows start in several ways: `Edges::count` of common.cuh.
    fn edges(&self, kernel: &Kernel, owners: usize) -> usize {
        let shared = matches!(kernel.regime, Regime::Cluster | Regime::Grid);
        let alike = self.problem.rows == 1 || self.alike(kernel, owners) == owners;
        if !shared || kernel.access != Access::Shifted || alike {
            return 0;
        }
        let vector = vector(self.problem, kernel.access);
        let vectors = self.problem.cols.saturating_sub(2 * (vector - 1)) / vector;
        (vectors.div_ceil(WARP) + 1) * vector
    }

    /// A persistent launch, and how many owners of rows it has, teams not counted.
    fn ring(&self, kernel: &Kernel, choice: &Choice, teams: usize) -> Result<(Launch, usize)> {
        let Choice { warps, blocks, .. } = *choice;
        let shared = self.shared(kernel, warps, teams);
        let Some(owners) = self.owners(kernel, warps, blocks, teams) else {
            bail!(
                "{}: no owners for {choice:?} of {:?}",
                self.problem.op_name(),
                self.problem
            )
        };
        let threads = teams * (warps + kernel.communicating) * WARP;
        let launch = Launch::new(
            self.problem,
            self.file(kernel),
            kernel.entry,
            [owners * blocks, 1],
            [threads, 1],
        )?;
        let launch = Launch {
            cluster: if kernel.regime == Regime::Cluster {
                blocks as u32
            } else {
                1
            },
            cooperative: kernel.regime == Regime::Grid,
            shared: shared as u32,
            ..launch
        };
        Ok((launch, owners))
    }

    /// A persistent launch in the warp regime, whose warps' sums pass through the ring's memory.
    fn warp_ring(&self, kernel: &Kernel, warps: usize) -> Result<Launch> {
        let (threads, rows) = (warps * WARP, self.problem.rows);
        let sums = warps * part_step(self.problem) * acc_bytes(self.problem);
        let shared = (warps * self.warp_shared(kernel)).max(sums);
        let resident = kernel
            .resident
            .min(self.device.shared_per_multiprocessor / (shared + RESERVED_SHARED))
            .max(1);
        let blocks = rows.div_ceil(threads / kernel.lanes);
        let blocks = match self.device.multiprocessors * resident {
            most if most >= blocks => blocks,
            // A warp keeps to rows of one shift.
            most => {
                let step = self.period(kernel) / gcd(self.period(kernel), warps);
                (most / step).max(1) * step
            }
        };
        let launch = Launch::new(
            self.problem,
            self.file(kernel),
            kernel.entry,
            [blocks, 1],
            [threads, 1],
        )?;
        Ok(Launch {
            shared: shared as u32,
            ..launch
        })
    }

    /// Teams of a block, each of which owns a row: as many as its threads and its shared memory hold.
    fn teams(&self, kernel: &Kernel, warps: usize) -> usize {
        let each = (warps * self.warp_shared(kernel))
            .max(2 * part_step(self.problem) * acc_bytes(self.problem));
        let by_shared = self
            .device
            .shared_per_block
            .saturating_sub(self.static_shared(kernel))
            / each.max(1);
        let most = (kernel.team_warps / (warps + kernel.communicating))
            .min(by_shared)
            .clamp(1, MAX_TEAMS);
        // On few multiprocessors, so many may leave no owners of rows of one shift.
        (2..=most)
            .rev()
            .find(|&teams| self.owners(kernel, warps, 1, teams).is_some())
            .unwrap_or(1)
    }

    fn backward(&self, kernel: &Kernel, choice: &Choice) -> Result<Backward> {
        let (problem, Choice { warps, blocks, .. }) = (self.problem, *choice);
        let (mut teams, mut edges) = (1, 0);
        let (parts, launches) = match kernel.regime {
            Regime::Warp => {
                let launch = self.warp_ring(kernel, warps)?;
                (launch.grid[0] as usize, vec![launch])
            }
            Regime::Block | Regime::Cluster | Regime::Grid => {
                if kernel.regime == Regime::Block {
                    teams = self.teams(kernel, warps);
                }
                let (launch, owners) = self.ring(kernel, choice, teams)?;
                edges = self.edges(kernel, owners);
                (owners, vec![launch])
            }
            Regime::Strips => {
                let lanes = warps * WARP;
                let rows_each = STRIPS_THREADS / lanes;
                let strips = problem
                    .cols
                    .div_ceil(STRIP_LANES * vector(problem, kernel.access));
                let launch = Launch::new(
                    problem,
                    kernel.file,
                    kernel.entry,
                    [strips + problem.rows.div_ceil(rows_each), 1],
                    [lanes, rows_each],
                )?;
                (1, vec![launch])
            }
            Regime::Split => {
                let parts = problem.rows.div_ceil(SPLIT_ROWS);
                let launch = |entry| {
                    Launch::new(
                        problem,
                        kernel.file,
                        entry,
                        [parts, blocks],
                        [SPLIT_THREADS, 1],
                    )
                };
                (parts, vec![launch(kernel.entry)?, launch(kernel.second)?])
            }
        };
        let finalize = finalize(problem, self.device, parts, kernel.regime != Regime::Split)?;
        Ok(Backward {
            regime: kernel.regime,
            blocks,
            teams,
            parts,
            edges,
            launches,
            finalize,
        })
    }
}

/// From one partial row of dweight or dbias to the next, which starts on 16 bytes too.
pub fn part_step(problem: &Problem) -> usize {
    problem.cols.next_multiple_of(16 / acc_bytes(problem))
}

/// `follows`: whether the launch before it is the one whose parts it adds.
fn finalize(
    problem: &Problem,
    device: &DeviceFacts,
    parts: usize,
    follows: bool,
) -> Result<Launch> {
    // To four blocks a multiprocessor, and one where they are more whatever the splits.
    let columns_of = |splits: usize| FINALIZE_THREADS / splits * 16 / acc_bytes(problem);
    let fits =
        |splits: usize| 2 * problem.cols.div_ceil(columns_of(splits)) <= 4 * device.multiprocessors;
    let mut splits = parts.next_power_of_two().min(FINALIZE_SPLITS);
    while splits > 1 && !fits(splits) {
        splits /= 2;
    }
    let lanes = FINALIZE_THREADS / splits;
    let columns = columns_of(splits);
    let launch = Launch::new(
        problem,
        "finalize",
        "finalize",
        [problem.cols.div_ceil(columns), 2],
        [lanes, splits],
    )?;
    Ok(Launch {
        early: follows && device.base >= 90,
        ..launch
    })
}

/// Values of a `Part` and of a `Pair`, the messages of blocks that share a row.
pub const FORWARD_MESSAGE: usize = 4;
pub const BACKWARD_MESSAGE: usize = 2;

/// Values through which the blocks of each row meet, each of which sends `message` of them: meeting_size of ring.cuh, for all rows.
pub fn meetings(problem: &Problem, regime: Regime, blocks: usize, message: usize) -> usize {
    match regime {
        Regime::Grid => problem.rows * blocks * (message + TOLD_STRIDE),
        _ => 0,
    }
}

/// Plans a forward pass over a problem that is not empty.
pub fn forward(
    problem: &Problem,
    access: Access,
    device: &DeviceFacts,
    choice: Option<&Choice>,
) -> Result<Forward> {
    check_cols(problem)?;
    let planner = Planner::forward_of(problem, access, device);
    match choice {
        Some(choice) => planner.forward(planner.find(choice)?, choice),
        None => planner
            .default()
            .and_then(|(kernel, choice)| planner.forward(kernel, &choice)),
    }
}

/// Plans a backward pass over a problem that is not empty.
pub fn backward(
    problem: &Problem,
    access: Access,
    device: &DeviceFacts,
    choice: Option<&Choice>,
) -> Result<Backward> {
    check_cols(problem)?;
    let planner = Planner::backward_of(problem, access, device);
    match choice {
        Some(choice) => planner.backward(planner.find(choice)?, choice),
        None => planner
            .default()
            .and_then(|(kernel, choice)| planner.backward(kernel, &choice)),
    }
}

/// Plans a forward pass that adds a residual first, where a kernel does: elsewhere the sum is a launch of its own, [`add`].
pub fn forward_add(
    problem: &Problem,
    access: Access,
    device: &DeviceFacts,
) -> Result<Option<Forward>> {
    check_cols(problem)?;
    let planner = Planner {
        adds: true,
        ..Planner::forward_of(problem, access, device)
    };
    let found = planner.first();
    found
        .map(|(kernel, choice)| planner.forward(kernel, &choice))
        .transpose()
}

/// As [`forward_add`], for a backward pass that takes the gradient of the sum.
pub fn backward_add(
    problem: &Problem,
    access: Access,
    device: &DeviceFacts,
) -> Result<Option<Backward>> {
    check_cols(problem)?;
    let planner = Planner {
        adds: true,
        ..Planner::backward_of(problem, access, device)
    };
    let found = planner.first();
    found
        .map(|(kernel, choice)| planner.backward(kernel, &choice))
        .transpose()
}

/// Plans a kernel of add.cu.
pub fn add(problem: &Problem, device: &DeviceFacts, entry: &'static str) -> Result<Launch> {
    const THREADS: usize = 256;
    // Each thread some vectors, so that blocks start seldom and end together.
    let blocks = (problem.rows * problem.cols)
        .div_ceil(vector(problem, Access::Wide) * THREADS)
        .clamp(1, 8 * device.multiprocessors);
    Launch::new(problem, "add", entry, [blocks, 1], [THREADS, 1])
}

/// Choices worth a measurement, of which the first is that of the plan without a choice.
pub fn forward_candidates(
    problem: &Problem,
    access: Access,
    device: &DeviceFacts,
) -> Result<Vec<Choice>> {
    Planner::forward_of(problem, access, device).choices()
}

/// As [`forward_candidates`], for a backward pass.
pub fn backward_candidates(
    problem: &Problem,
    access: Access,
    device: &DeviceFacts,
) -> Result<Vec<Choice>> {
    Planner::backward_of(problem, access, device).choices()
}

/// The table's own name of a forward kernel.
pub fn forward_entry(name: &str) -> Option<&'static str> {
    entry(FORWARD, name)
}

/// The table's own name of a backward kernel.
pub fn backward_entry(name: &str) -> Option<&'static str> {
    entry(BACKWARD, name)
}

fn entry(table: &[Kernel], name: &str) -> Option<&'static str> {
    table.iter().map(|k| k.entry).find(|&entry| entry == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use std::collections::HashSet;

    const H200: DeviceFacts = DeviceFacts {
        multiprocessors: 132,
        shared_per_block: 227 * 1024,
        shared_per_multiprocessor: 228 * 1024,
        l2: 50 << 20,
        max_cluster: 16,
        cooperative: true,
        base: 90,
    };
    const A100: DeviceFacts = DeviceFacts {
        multiprocessors: 108,
        shared_per_block: 163 * 1024,
        shared_per_multiprocessor: 164 * 1024,
        l2: 40 << 20,
        max_cluster: 1,
        cooperative: true,
        base: 80,
    };
    const RTX_4090: DeviceFacts = DeviceFacts {
        multiprocessors: 128,
        shared_per_block: 99 * 1024,
        shared_per_multiprocessor: 100 * 1024,
        l2: 72 << 20,
        max_cluster: 1,
        cooperative: true,
        base: 80,
    };
    const RTX_5090: DeviceFacts = DeviceFacts {
        multiprocessors: 170,
        l2: 96 << 20,
        max_cluster: 8,
        base: 90,
        ..RTX_4090
    };
    /// A GPU of few multiprocessors; an Orin has 8.
    const SMALL: DeviceFacts = DeviceFacts {
        multiprocessors: 6,
        l2: 1 << 20,
        ..RTX_4090
    };
    const SMALLEST: DeviceFacts = DeviceFacts {
        multiprocessors: 1,
        ..SMALL
    };
    const DEVICES: [DeviceFacts; 6] = [H200, A100, RTX_4090, RTX_5090, SMALL, SMALLEST];

    fn problem(rows: usize, cols: usize, dtype: DType) -> Problem {
        Problem {
            rows,
            cols,
            dtype,
            param_dtype: dtype,
            weight: true,
            zero_centered_weight: false,
            bias: true,
            remove_mean: true,
            eps: 1e-5,
        }
    }

    fn planner<'a>(
        problem: &'a Problem,
        access: Access,
        device: &'a DeviceFacts,
        tensors: usize,
    ) -> Planner<'a> {
        Planner {
            problem,
            access,
            device,
            tensors,
            adds: false,
        }
    }

    /// As a call may find its tensors.
    fn accesses(p: &Problem) -> [Access; 3] {
        [
            Access::of(p, true, true),
            Access::of(p, true, false),
            Access::of(p, false, true),
        ]
    }

    /// The numbers in the tables are those with which the kernels are instantiated.
    #[test]
    fn tables_mirror_the_kernels() {
        let sources = [
            ("forward", include_str!("../kernels/forward.cu")),
            ("forward_ring", include_str!("../kernels/forward_ring.cu")),
            ("backward", include_str!("../kernels/backward.cu")),
            ("backward_ring", include_str!("../kernels/backward_ring.cu")),
            (
                "backward_strips",
                include_str!("../kernels/backward_strips.cu"),
            ),
            ("split", include_str!("../kernels/split.cu")),
        ];
        let mut planned = HashSet::new();
        for kernel in [FORWARD, BACKWARD, FORWARD_ADD, BACKWARD_ADD].concat() {
            let Kernel {
                lanes,
                per_thread,
                slots,
                bias_slots,
                communicating,
                resident,
                most_warps,
                rows,
                ..
            } = kernel;
            let (name, vec) = match kernel.access {
                Access::Single => ("single", "1"),
                Access::Wide if kernel.file == "forward_add" => ("add", "kWide"),
                Access::Wide if kernel.file.starts_with("backward") => ("WIDE", "kWide"),
                Access::Wide => ("wide", "kWide"),
                Access::Shifted | Access::Skewed => ("shifted", "kWide"),
            };
            let owner = match kernel.regime {
                Regime::Block => "block",
                Regime::Cluster => "cluster",
                _ => "grid",
            };
            let long = if kernel.entry.contains("long") {
                "long_"
            } else {
                ""
            };
            let mut kind = format!(
                "Owner::{}{}, {communicating}, ",
                owner[..1].to_uppercase(),
                &owner[1..]
            );
            if kernel.entry.contains("giant") {
                let threads = (most_warps[1] + communicating) * WARP;
                kind += &format!("true, {bias_slots}, {threads})");
            }
            let (alone, together) = (most_warps[0] * WARP, most_warps[1] * WARP);
            let expected = match (kernel.file, kernel.regime) {
                ("forward", Regime::Warp) if kernel.small => {
                    vec![format!(
                        "FORWARD_WARP_SMALL({lanes}, {per_thread}, {resident})"
                    )]
                }
                ("forward", Regime::Block) if kernel.small => {
                    vec![format!(
                        "FORWARD_BLOCK_SMALL({together}, {per_thread}, {resident})"
                    )]
                }
                ("forward", Regime::Block) if kernel.exact => {
                    vec![format!("FORWARD_BLOCK_EXACT({together}, {per_thread}, ")]
                }
                (
                    "forward" | "forward_single" | "forward_shifted" | "forward_add",
                    Regime::Warp,
                ) => {
                    vec![format!(
                        "FORWARD_WARP({name}, {vec}, {lanes}, {per_thread}, {rows}, "
                    )]
                }
                ("forward" | "forward_single" | "forward_shifted" | "forward_add", _) => {
                    // Of wide kernels, those that load x more than once are named for it.
                    let name = kernel.entry.split('_').nth(2).unwrap();
                    vec![if alone == together {
                        format!("FORWARD_BLOCK({name}, {vec}, {per_thread}, {rows}, {together}, ")
                    } else {
                        assert_eq!((alone, rows), (1024, 1), "{kernel:?}");
                        format!("FORWARD_BLOCK_MOST({name}, {vec}, {per_thread}, {together}, ")
                    }]
                }
                ("forward_ring", _) if kernel.entry.contains("giant") => {
                    vec![format!("FORWARD_RING(giant_wide, {per_thread}, {slots}, ")]
                }
                ("forward_ring" | "forward_ring_shifted", _) => {
                    vec![format!("RING({long}{owner}, {per_thread}, {slots}, ")]
                }
                ("backward" | "backward_single" | "backward_add" | "backward_shifted", _) => {
                    let (ring, threads) = (slots / per_thread, most_warps[0] * WARP);
                    vec![format!(
                        "BACKWARD_WARP({name}, {vec}, {lanes}, {per_thread}, {ring}, {threads}, {resident})"
                    )]
                }
                ("backward_ring" | "backward_ring_add" | "backward_ring_shifted", _) => {
                    let rows = slots / per_thread;
                    vec![format!("RING({long}{owner}, {per_thread}, {rows}, ")]
                }
                ("backward_strips", _) => vec![format!("BACKWARD_STRIPS({per_thread})")],
                _ => vec![format!("SPLIT({name}, {vec})")],
            };
            let stem = kernel
                .file
                .replace("_single", "")
                .replace("_add", "")
                .replace("_shifted", "");
            let (_, source) = sources.iter().find(|(file, _)| *file == stem).unwrap();
            let of_kernel = |line: &&str| {
                expected.iter().any(|e| line.contains(e))
                    && (communicating == 0 || line.contains(&kind))
            };
            let found: Vec<_> = source.lines().filter(of_kernel).collect();
            assert!(
                !found.is_empty(),
                "{kernel:?} is not in the source as {expected:?}, {kind}"
            );
            planned.extend(found);
        }
        // What no plan picks is not built.
        for (file, source) in sources {
            let instance = |line: &&str| {
                let of = ["FORWARD_", "BACKWARD_", "RING(", "SPLIT("];
                of.iter().any(|macro_name| line.starts_with(macro_name))
            };
            for line in source.lines().filter(instance) {
                assert!(planned.contains(line), "{file}.cu: no plan picks {line}");
            }
        }
    }

    /// What must hold for a launch, whatever the plan.
    fn check(
        launch: &Launch,
        kernel: &Kernel,
        p: &Problem,
        plan_blocks: usize,
        teams: usize,
        device: &DeviceFacts,
    ) {
        let threads = launch.block[0] * launch.block[1];
        assert!(threads.is_multiple_of(32) && threads <= 1024, "{launch:?}");
        assert!(
            launch.shared as usize + 1024 <= device.shared_per_block,
            "{launch:?}"
        );
        assert!(launch.grid[0] >= 1 && launch.grid[1] >= 1, "{launch:?}");
        assert!(launch.cluster as usize <= device.max_cluster, "{launch:?}");
        assert_eq!(launch.grid[0] % launch.cluster, 0, "{launch:?}");
        // Of those that wait for what they follow, all where the base knows how.
        let waits = matches!(kernel.regime, Regime::Warp | Regime::Block)
            && launch.entry.starts_with("forward");
        assert_eq!(launch.early, waits && device.base >= 90, "{launch:?}");
        if launch.cooperative {
            assert!(
                launch.grid[0] as usize <= device.multiprocessors,
                "{launch:?}"
            );
            assert_eq!(launch.grid[0] as usize % plan_blocks, 0, "{launch:?}");
            assert!(plan_blocks <= MAX_GROUP, "{launch:?}");
        }
        let vector = vector(p, kernel.access);
        let grouped = matches!(kernel.regime, Regime::Cluster | Regime::Grid);
        if kernel.access == Access::Shifted && kernel.slots > 0 && !grouped {
            let warps = launch.block[0] as usize / WARP;
            let owners = launch.grid[0] as usize
                * if kernel.regime == Regime::Warp {
                    warps
                } else {
                    teams
                };
            assert!(
                owners >= p.rows || (owners * p.cols).is_multiple_of(vector),
                "{launch:?}"
            );
        }
        let warps = threads as usize / WARP / teams - kernel.communicating;
        let blocks = match kernel.regime {
            Regime::Cluster => launch.cluster as usize,
            Regime::Grid => plan_blocks,
            _ => 1,
        };
        let held = match kernel.regime {
            Regime::Warp => kernel.lanes * kernel.per_thread,
            Regime::Strips => {
                let [lanes, teams] = launch.block.map(|n| n as usize);
                let strips = p.cols.div_ceil(32 / p.dtype.size_in_bytes());
                assert!(threads as usize <= STRIPS_THREADS, "{launch:?}");
                assert_eq!(
                    launch.grid,
                    [(strips + p.rows.div_ceil(teams)) as u32, 1],
                    "{launch:?}"
                );
                lanes * kernel.per_thread
            }
            Regime::Split => return,
            // As ring.cuh shares a row out: whole chunks of 32 vectors a block.
            _ => {
                let vectors = p.cols / vector;
                let share = vectors.div_ceil(blocks * WARP) * WARP;
                assert!(
                    share <= warps * WARP * kernel.per_thread,
                    "{launch:?} does not hold {share} vectors of {}",
                    p.cols
                );
                blocks * warps * WARP * kernel.per_thread
            }
        };
        // Columns that no vector holds are lanes', one each.
        assert!(
            held >= p.cols / vector,
            "{launch:?} holds {} of {} columns",
            held * vector,
            p.cols
        );
    }

    fn check_forward(
        p: &Problem,
        access: Access,
        device: &DeviceFacts,
        kernel: &Kernel,
        choice: &Choice,
    ) {
        let plan = planner(p, access, device, 1)
            .forward(kernel, choice)
            .unwrap();
        assert_eq!(
            plan.launches.len(),
            if plan.regime == Regime::Split { 2 } else { 1 }
        );
        for launch in &plan.launches {
            check(launch, kernel, p, plan.blocks, 1, device);
        }
    }

    fn check_backward(
        p: &Problem,
        access: Access,
        device: &DeviceFacts,
        kernel: &Kernel,
        choice: &Choice,
    ) {
        let plan = planner(p, access, device, 2)
            .backward(kernel, choice)
            .unwrap();
        assert!(plan.parts >= 1 && plan.parts <= p.rows, "{plan:?}");
        for launch in &plan.launches {
            check(launch, kernel, p, plan.blocks, plan.teams, device);
        }
        let [lanes, splits] = plan.finalize.block.map(|n| n as usize);
        assert_eq!(lanes * splits, FINALIZE_THREADS, "{plan:?}");
        let columns = plan.finalize.grid[0] as usize * lanes * 16 / acc_bytes(p);
        assert!(columns >= p.cols, "{plan:?}");
    }

    #[test]
    fn every_plan_covers_its_rows() {
        let around = |c: usize| [c - 1, c, c + 1];
        let mut widths = vec![
            1, 2, 3, 5, 7, 769, 1000, 4001, 5120, 12288, 50257, 100003, 1000003, 4194304,
        ];
        widths.extend((3..22).flat_map(|log| around(1 << log)));
        for device in DEVICES {
            for dtype in [DType::F32, DType::BF16, DType::F64] {
                for &cols in &widths {
                    for rows in [1, 2, 31, 132, 4097, 70001] {
                        let p = problem(rows, cols, dtype);
                        for access in accesses(&p) {
                            let forward = planner(&p, access, &device, 1);
                            let (kernel, choice) = forward.default().unwrap();
                            check_forward(&p, access, &device, kernel, &choice);
                            let backward = planner(&p, access, &device, 2);
                            let (kernel, choice) = backward.default().unwrap();
                            check_backward(&p, access, &device, kernel, &choice);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_candidate_covers_its_rows() {
        for device in DEVICES {
            for (rows, cols) in [
                (5, 136),
                (7400, 256),
                (512, 768),
                (2112, 1032),
                (100, 4104),
                (8192, 8192),
                (2048, 32768),
                (512, 131072),
                (16, 4194304),
                (64, 50257),
            ] {
                for dtype in [DType::F32, DType::BF16] {
                    let p = problem(rows, cols, dtype);
                    let access = Access::of(&p, true, true);
                    let forward = planner(&p, access, &device, 1).candidates();
                    let backward = planner(&p, access, &device, 2).candidates();
                    assert!(!forward.is_empty() && !backward.is_empty());
                    forward
                        .iter()
                        .for_each(|(k, c)| check_forward(&p, access, &device, k, c));
                    backward
                        .iter()
                        .for_each(|(k, c)| check_backward(&p, access, &device, k, c));
                }
            }
        }
    }

    #[test]
    fn regimes_change_where_documented() {
        use Regime::{Block, Cluster, Grid, Split, Warp};
        let regimes = |dtype, cols, access, device: &DeviceFacts| {
            let p = problem(4096, cols, dtype);
            (
                forward(&p, access, device, None).unwrap().regime,
                backward(&p, access, device, None).unwrap().regime,
            )
        };
        let of = |dtype, cols, device: &DeviceFacts| regimes(dtype, cols, Access::Wide, device);
        for (dtype, cols, expected) in [
            (DType::F32, 256, (Warp, Warp)),
            (DType::F32, 260, (Warp, Warp)),
            (DType::F32, 516, (Block, Warp)),
            (DType::F32, 1024, (Block, Warp)),
            (DType::F32, 1028, (Block, Block)),
            (DType::F32, 4096, (Block, Block)),
            (DType::F32, 4100, (Block, Cluster)),
            (DType::F32, 16384, (Block, Cluster)),
            (DType::F32, 16388, (Cluster, Cluster)),
            (DType::F32, 65536, (Cluster, Cluster)),
            (DType::F32, 135168, (Cluster, Cluster)),
            (DType::F32, 135172, (Cluster, Grid)),
            (DType::F32, 270336, (Cluster, Grid)),
            (DType::F32, 270340, (Grid, Grid)),
            (DType::F32, 1048576, (Grid, Grid)),
            (DType::F32, 4194304, (Grid, Split)),
            (DType::F32, 4274692, (Split, Split)),
            (DType::BF16, 512, (Warp, Warp)),
            (DType::BF16, 1024, (Warp, Warp)),
            (DType::BF16, 1032, (Block, Block)),
            (DType::BF16, 1544, (Block, Block)),
            (DType::BF16, 8192, (Block, Block)),
            (DType::BF16, 8448, (Block, Block)),
            (DType::BF16, 8456, (Block, Cluster)),
            (DType::BF16, 16384, (Block, Cluster)),
            (DType::BF16, 16392, (Cluster, Cluster)),
            (DType::BF16, 135168, (Cluster, Cluster)),
            (DType::BF16, 135176, (Cluster, Grid)),
            (DType::BF16, 540672, (Cluster, Grid)),
            (DType::BF16, 540680, (Grid, Grid)),
            (DType::BF16, 4194304, (Grid, Split)),
            (DType::F64, 256, (Warp, Warp)),
            (DType::F64, 258, (Block, Block)),
            (DType::F64, 3074, (Block, Cluster)),
            (DType::F64, 4098, (Cluster, Cluster)),
        ] {
            assert_eq!(of(dtype, cols, &H200), expected, "{dtype:?} {cols}");
        }
        for (dtype, cols, expected) in [
            (DType::BF16, 12295, (Block, Cluster)),
            (DType::BF16, 12297, (Cluster, Cluster)),
            (DType::BF16, 49159, (Cluster, Cluster)),
            (DType::BF16, 49161, (Grid, Cluster)),
            (DType::BF16, 61447, (Grid, Cluster)),
            (DType::BF16, 61449, (Grid, Grid)),
            (DType::F32, 65539, (Cluster, Cluster)),
            (DType::F32, 65541, (Grid, Cluster)),
        ] {
            let got = regimes(dtype, cols, Access::Shifted, &H200);
            assert_eq!(got, expected, "{dtype:?} {cols}, unaligned");
        }
        // No clusters before compute capability 9.0: blocks meet in global memory.
        assert_eq!(of(DType::F32, 32768, &A100), (Block, Grid));
        assert_eq!(of(DType::F32, 32772, &RTX_4090), (Grid, Grid));
        // The row that the crate started from: 16 of 4194304, on a 4090.
        assert_eq!(of(DType::F32, 4194304, &RTX_4090), (Split, Split));
        // Neither may wait for each other's blocks where these may not all be resident.
        let alone = DeviceFacts {
            cooperative: false,
            ..A100
        };
        assert_eq!(of(DType::F32, 65536, &alone), (Split, Split));
    }

    /// Which are loaded once for two rows, or kept by clusters.
    #[test]
    fn f32_weights_beside_halves_take_kernels_of_their_own() {
        let of = |cols, params, device: &DeviceFacts| {
            let p = Problem {
                param_dtype: params,
                ..problem(4097, cols, DType::BF16)
            };
            let access = Access::of(&p, true, true);
            let Launch { entry, grid, .. } = forward(&p, access, device, None).unwrap().launches[0];
            (entry, grid[0])
        };
        for (cols, of_f32, of_bf16) in [
            (
                1024,
                ("forward_warp_wide_32x4x2", 513),
                ("forward_warp_wide_32x4x1", 1025),
            ),
            (
                1536,
                ("forward_block_wide_3x2", 2049),
                ("forward_block_wide_3x1", 4097),
            ),
            (
                4096,
                ("forward_block_wide_128x4x1", 4097),
                ("forward_block_wide_128x4x1", 4097),
            ),
            (
                8200,
                ("forward_cluster_wide", 396),
                ("forward_block_twice_4x1", 4097),
            ),
            // Eight at a time that start alike.
            (
                1001,
                ("forward_warp_shifted_32x4x2", 514),
                ("forward_warp_shifted_32x4x1", 1025),
            ),
            (
                1537,
                ("forward_block_shifted_3x2", 2056),
                ("forward_block_shifted_3x1", 4097),
            ),
            (
                4001,
                ("forward_block_shifted_4x2", 2056),
                ("forward_block_shifted_4x1", 4097),
            ),
            (
                5121,
                ("forward_block_shifted_4x1", 4097),
                ("forward_block_shifted_4x1", 4097),
            ),
        ] {
            assert_eq!(of(cols, DType::F32, &H200), of_f32, "{cols}");
            assert_eq!(of(cols, DType::BF16, &H200), of_bf16, "{cols}");
        }
        assert_eq!(
            of(8200, DType::F32, &A100),
            ("forward_block_twice_4x1", 4097)
        );
    }

    #[test]
    fn calls_of_one_wave_take_kernels_of_their_own() {
        let of = |rows, cols, dtype, access| {
            let plan = forward(&problem(rows, cols, dtype), access, &H200, None).unwrap();
            let Launch { entry, block, .. } = plan.launches[0];
            (entry, block[0])
        };
        // 132 multiprocessors, each with so many rows.
        for (cols, dtype, each, small, other) in [
            (
                128,
                DType::F32,
                112,
                ("forward_warp_small_8x4x1", 128),
                "forward_warp_wide_16x4x2",
            ),
            (
                256,
                DType::F32,
                40,
                ("forward_warp_small_32x2x1", 128),
                "forward_warp_wide_16x4x2",
            ),
            (
                512,
                DType::F32,
                16,
                ("forward_warp_small_32x6x1", 128),
                "forward_warp_wide_32x4x1",
            ),
            (
                768,
                DType::F32,
                16,
                ("forward_warp_small_32x6x1", 128),
                "forward_block_wide_4x1",
            ),
            (
                1024,
                DType::F32,
                16,
                ("forward_block_small_64x4x1", 64),
                "forward_block_wide_4x1",
            ),
            (
                1028,
                DType::F32,
                8,
                ("forward_block_small_128x4x1", 128),
                "forward_block_wide_4x1",
            ),
            (
                4096,
                DType::F32,
                4,
                ("forward_block_small_256x4x1", 256),
                "forward_block_wide_4x1",
            ),
            (
                256,
                DType::F16,
                56,
                ("forward_warp_small_16x2x1", 128),
                "forward_warp_wide_16x2x2",
            ),
            (
                520,
                DType::F16,
                16,
                ("forward_block_small_64x2x1", 64),
                "forward_warp_wide_32x3x1",
            ),
            (
                1024,
                DType::BF16,
                16,
                ("forward_block_small_64x2x1", 64),
                "forward_warp_wide_32x4x1",
            ),
            (
                1536,
                DType::BF16,
                8,
                ("forward_block_small_64x4x1", 64),
                "forward_block_wide_3x1",
            ),
            (
                4096,
                DType::BF16,
                4,
                ("forward_block_small_128x4x1", 128),
                "forward_block_wide_128x4x1",
            ),
            (
                8192,
                DType::F16,
                2,
                ("forward_block_small_256x4x1", 256),
                "forward_block_wide_256x4x1",
            ),
        ] {
            let most = 132 * each;
            for rows in [1, most] {
                assert_eq!(
                    of(rows, cols, dtype, Access::Wide),
                    small,
                    "{rows} x {cols}"
                );
            }
            assert_eq!(of(most + 1, cols, dtype, Access::Wide).0, other, "{cols}");
        }
        for (cols, dtype, access) in [
            (64, DType::F32, Access::Wide),
            (768, DType::F64, Access::Wide),
            (4100, DType::F32, Access::Wide),
            (769, DType::BF16, Access::Shifted),
            (768, DType::BF16, Access::Single),
        ] {
            let (entry, _) = of(1, cols, dtype, access);
            assert!(!entry.contains("small"), "{entry} for {cols}");
        }
    }

    #[test]
    fn small_tensors_are_differentiated_in_one_launch() {
        let of = |rows, cols, dtype, access, device: &DeviceFacts| {
            let plan = backward(&problem(rows, cols, dtype), access, device, None).unwrap();
            (plan.regime == Regime::Strips).then_some(plan.launches[0].entry)
        };
        let wide = |rows, cols, dtype| of(rows, cols, dtype, Access::Wide, &H200);
        let [two, four] = ["backward_strips_wide_2", "backward_strips_wide_4"].map(Some);
        for (rows, cols, dtype, expected) in [
            (1, 4, DType::F32, two),
            (512, 768, DType::F32, two),
            (1024, 2048, DType::F32, two),
            (512, 2052, DType::F32, four),
            (512, 4096, DType::F32, four),
            (512, 4100, DType::F32, None),
            // No more than 2048 rows.
            (2048, 64, DType::F32, two),
            (2049, 64, DType::F32, None),
            // x and dy no more than a third of L2.
            (2048, 1064, DType::F32, two),
            (2048, 1068, DType::F32, None),
            (2048, 2128, DType::BF16, two),
            (2048, 2136, DType::BF16, None),
            (8, 4096, DType::BF16, two),
            (8, 4104, DType::BF16, None),
            (8, 1024, DType::F64, two),
            (8, 2048, DType::F64, four),
            (8, 2050, DType::F64, None),
        ] {
            assert_eq!(wide(rows, cols, dtype), expected, "{rows} x {cols}");
        }
        let little = DeviceFacts {
            l2: 4 << 20,
            ..A100
        };
        assert_eq!(of(512, 768, DType::F32, Access::Wide, &A100), two);
        assert_eq!(of(512, 768, DType::F32, Access::Wide, &little), None);
        assert_eq!(of(512, 769, DType::F32, Access::Shifted, &H200), None);
    }

    #[test]
    fn unaligned_rows_and_tensors_take_16_bytes_at_a_time() {
        let p = problem(64, 50257, DType::F16);
        let of = |access| {
            let launch = forward(&p, access, &H200, None).unwrap().launches[0];
            (launch.file, launch.entry, launch.shared)
        };
        assert_eq!(Access::of(&p, true, true), Access::Shifted);
        let (file, entry, shared) = of(Access::Shifted);
        assert_eq!(
            (file, entry),
            ("forward_ring_shifted", "forward_grid_shifted")
        );
        // Nor does the tensor: of each chunk of 32 vectors, a lane copies two.
        assert_eq!(Access::of(&p, false, true), Access::Skewed);
        assert_eq!(
            of(Access::Skewed),
            ("forward_ring_skewed", entry, shared / 32 * 33)
        );
    }

    #[test]
    fn edges_are_those_of_the_kernels() {
        let of = |rows, cols, dtype, access| {
            let plan = backward(&problem(rows, cols, dtype), access, &H200, None).unwrap();
            (plan.regime, plan.edges)
        };
        // As `Edges::count` of common.cuh: 8 (f32: 4) for each chunk of 32 of 124998 (12562) vectors, and as many for the columns behind.
        let grid = of(64, 1000003, DType::BF16, Access::Shifted);
        assert_eq!(grid, (Regime::Grid, 8 * (3907 + 1)));
        let cluster = of(64, 50257, DType::F32, Access::Shifted);
        assert_eq!(cluster, (Regime::Cluster, 4 * (393 + 1)));
        // One row starts in one way, and so do the rows that a block or a warp owns, and aligned ones.
        assert_eq!(of(1, 50257, DType::F32, Access::Shifted).1, 0);
        assert_eq!(of(64, 50256, DType::F32, Access::Wide).1, 0);
        for cols in [769, 4001] {
            assert_eq!(of(4096, cols, DType::BF16, Access::Shifted).1, 0);
        }
    }

    #[test]
    fn teams_leave_owners_on_few_multiprocessors() {
        // Of 12 blocks that are resident with one team, 8 own rows; with three teams a block, of 6 none would.
        let p = problem(4096, 1801, DType::BF16);
        let plan = backward(&p, Access::Shifted, &SMALL, None).unwrap();
        assert_eq!(plan.launches[0].entry, "backward_block_shifted");
        assert!(
            (plan.teams * plan.launches[0].grid[0] as usize).is_multiple_of(8),
            "{plan:?}"
        );
    }

    #[test]
    fn clusters_of_halves_grow_where_more_warps_are_resident() {
        for (cols, dtype, warps, blocks) in [
            (16001, DType::BF16, 4, 8),
            (32001, DType::BF16, 4, 16),
            (33999, DType::BF16, 9, 8),
            (8601, DType::BF16, 9, 2),
            (12289, DType::BF16, 12, 2),
            (8960, DType::F16, 3, 4),
            (33856, DType::F16, 3, 16),
            (16384, DType::F16, 11, 2),
            (6080, DType::F32, 6, 2),
        ] {
            let p = problem(4096, cols, dtype);
            let plan = planner(&p, Access::of(&p, true, true), &H200, 2);
            let (_, choice) = plan.default().unwrap();
            assert_eq!((choice.warps, choice.blocks), (warps, blocks), "{cols}");
        }
    }

    #[test]
    fn a_group_that_leaves_many_multiprocessors_idle_grows() {
        // 70 blocks would hold the row, and leave 62 of 132 idle: 4480 chunks are equal parts for 128.
        let p = problem(64, 70 * 8192, DType::F32);
        let plan = forward(&p, Access::Wide, &H200, None).unwrap();
        assert_eq!((plan.regime, plan.blocks), (Regime::Grid, 128));
        // Of 4481, there are none.
        let p = problem(64, 70 * 8192 + 128, DType::F32);
        let plan = forward(&p, Access::Wide, &H200, None).unwrap();
        assert_eq!((plan.regime, plan.blocks), (Regime::Grid, 132));
        // 2 groups of 64 use 128.
        let p = problem(64, 64 * 8192, DType::F32);
        let plan = forward(&p, Access::Wide, &H200, None).unwrap();
        assert_eq!((plan.blocks, plan.launches[0].grid[0]), (64, 128));
    }

    #[test]
    fn owners_of_unaligned_rows_keep_to_rows_that_start_alike() {
        use Regime::{Cluster, Grid};
        for (rows, cols, dtype, expected) in [
            // 66 clusters of 2 would be resident, and the busiest of 64 has no more rows: 32.
            (2048, 12289, DType::BF16, (Cluster, 2, 64, false)),
            // Of these it would have, and so there are 15 of 8.
            (1024, 50257, DType::BF16, (Cluster, 8, 15, true)),
            // 10 groups of 13 blocks hold the rows, 8 of 16 without changes.
            (512, 100003, DType::BF16, (Grid, 16, 8, false)),
            (512, 100003, DType::F32, (Grid, 16, 8, false)),
            // One group has all rows, and all multiprocessors.
            (64, 1000003, DType::BF16, (Grid, 132, 1, true)),
        ] {
            let p = problem(rows, cols, dtype);
            let plan = backward(&p, Access::Shifted, &H200, None).unwrap();
            let got = (plan.regime, plan.blocks, plan.parts, plan.edges > 0);
            assert_eq!(got, expected, "{rows} x {cols} {dtype:?}");
        }
    }

    #[test]
    fn candidates_begin_with_the_built_in_plan() {
        for (rows, cols) in [(512, 768), (16, 4194304), (64, 50257)] {
            let p = problem(rows, cols, DType::F32);
            let access = Access::of(&p, true, true);
            let forward_choices = forward_candidates(&p, access, &H200).unwrap();
            assert_eq!(
                forward(&p, access, &H200, forward_choices.first()).unwrap(),
                forward(&p, access, &H200, None).unwrap()
            );
            let backward_choices = backward_candidates(&p, access, &H200).unwrap();
            assert_eq!(
                backward(&p, access, &H200, backward_choices.first()).unwrap(),
                backward(&p, access, &H200, None).unwrap()
            );
            for choices in [forward_choices, backward_choices] {
                let repeated = |i: usize| choices[i + 1..].contains(&choices[i]);
                assert!(!(0..choices.len()).any(repeated), "{choices:?}");
            }
        }
    }

    /// What is said of a choice that is refused.
    fn refusal<T: std::fmt::Debug>(planned: Result<T>) -> String {
        let error = planned.unwrap_err().to_string();
        error.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn strips_of_too_much_are_refused() {
        let choice = Choice {
            entry: "backward_strips_wide_2",
            warps: 8,
            blocks: 1,
        };
        for (rows, cols, why) in [
            (4096, 768, "expected rows to 2048, got 4096"),
            (
                2048,
                2048,
                "expected bytes of x and dy to 17476266, got 33554432",
            ),
        ] {
            let p = problem(rows, cols, DType::F32);
            assert_eq!(
                refusal(backward(&p, Access::Wide, &H200, Some(&choice))),
                format!("layer-norm: tuning: `backward_strips_wide_2`: {why}")
            );
        }
    }

    #[test]
    fn a_choice_that_cannot_hold_the_row_is_refused() {
        let p = problem(64, 8192, DType::F32);
        for (entry, warps, blocks, why) in [
            (
                "forward_block_twice_4x1",
                8,
                1,
                "`forward_block_twice_4x1`: expected 16 warps or more, got 8",
            ),
            (
                "forward_block_twice_4x1",
                17,
                1,
                "`forward_block_twice_4x1`: expected warps to 16, got 17",
            ),
            (
                "forward_block_wide_4x1",
                4,
                1,
                "`forward_block_wide_4x1`: expected columns to 4096, got 8192",
            ),
            (
                "forward_warp_wide_32x4x1",
                4,
                1,
                "`forward_warp_wide_32x4x1`: expected columns to 512, got 8192",
            ),
            (
                "forward_long_cluster_wide",
                11,
                3,
                "`forward_long_cluster_wide`: expected a cluster of 2, 4, .. blocks to 16, got 3",
            ),
            (
                "forward_block_single_16x1",
                16,
                1,
                "no kernel `forward_block_single_16x1` for f32 of 8192 columns",
            ),
            (
                "split_moments_wide",
                8,
                1 << 24,
                "`split_moments_wide`: expected blocks to 8, got 16777216",
            ),
        ] {
            let choice = Choice {
                entry,
                warps,
                blocks,
            };
            assert_eq!(
                refusal(forward(&p, Access::Wide, &H200, Some(&choice))),
                format!("layer-norm: tuning: {why}")
            );
        }
    }

    #[test]
    fn the_widest_row_and_more_than_2_to_the_32_elements_are_planned() {
        let widest = i32::MAX as usize;
        for device in DEVICES {
            for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
                for (rows, cols) in [
                    (1, widest),
                    (1, widest - 7),
                    (5, widest),
                    ((1 << 32) + 1, 1),
                    (1 << 31, 3),
                    ((1 << 22) + 1, 1024),
                    ((1 << 20) + 1, 4097),
                    (65537, 65536),
                    (4097, 1 << 20),
                ] {
                    let p = problem(rows, cols, dtype);
                    for access in accesses(&p) {
                        let forward = planner(&p, access, &device, 1);
                        let (kernel, choice) = forward.default().unwrap();
                        check_forward(&p, access, &device, kernel, &choice);
                        let backward = planner(&p, access, &device, 2);
                        let (kernel, choice) = backward.default().unwrap();
                        check_backward(&p, access, &device, kernel, &choice);
                    }
                }
            }
        }
    }

    #[test]
    fn more_rows_than_split_takes_are_refused() {
        let p = problem((1 << 35) + 1, 1 << 23, DType::F32);
        for error in [
            forward(&p, Access::Wide, &H200, None).unwrap_err(),
            backward(&p, Access::Wide, &H200, None).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(
                error.starts_with(
                    "layer-norm: xs: expected no more than 2^31 - 1 blocks of work, got "
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn columns_beyond_32_bits_are_refused() {
        let p = problem(1, 1 << 31, DType::BF16);
        let error = forward(&p, Access::Wide, &H200, None)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(
                "layer-norm: xs: expected rows of at most 2^31 - 1 columns on CUDA, got 2147483648"
            ),
            "{error}"
        );
    }
}
