//! Which kernel runs, and on what grid: a pure function of the problem and the device, printable and comparable.
//!
//! | regime | who owns a row | reads of x |
//! |---|---|---|
//! | warp | a group of 4 to 32 lanes | 1 |
//! | block | a block | 1 |
//! | cluster | 2 to 8 blocks that share memory (compute capability 9.0 and later) | 1 |
//! | split | all blocks, in two launches | 2 |
//!
//! The constants below mirror those of the kernels, which say what each entry accepts.

use crate::problem::Problem;
use candle_core::{DType, Result, bail};

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
    /// The compute capability that the PTX in use was compiled for: 80, or 90, which has clusters.
    pub base: u32,
}

/// Who owns a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Regime {
    /// A group of lanes.
    Warp,
    /// A block.
    Block,
    /// A cluster of blocks.
    Cluster,
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
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// How a forward pass runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Who owns a row.
    pub regime: Regime,
    /// Lanes that own a row, in the warp regime.
    pub lanes: u32,
    /// Tiles that a row is split into, in the split regime.
    pub tiles: usize,
    /// In order; two in the split regime.
    pub launches: Vec<Launch>,
}

/// How a backward pass runs. `finalize` follows the launches if there is more than one part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backward {
    /// Who owns a row.
    pub regime: Regime,
    /// Lanes that own a row, in the warp regime.
    pub lanes: u32,
    /// Tiles that a row is split into, in the split regime.
    pub tiles: usize,
    /// Partial rows of dweight and of dbias.
    pub parts: usize,
    /// In order; two in the split regime.
    pub launches: Vec<Launch>,
    /// Adds the parts.
    pub finalize: Launch,
}

/// An entry, and the vectors of a row that one of its threads holds.
#[derive(Clone, Copy)]
struct Variant {
    entry: &'static str,
    per_thread: usize,
}

/// Elements in a vector: 16 bytes where rows are aligned, else one.
fn vector(problem: &Problem, aligned: bool) -> usize {
    if aligned {
        16 / problem.dtype.size_in_bytes()
    } else {
        1
    }
}

/// Whether every row of a tensor that starts on 16 bytes does so too.
pub fn rows_align(problem: &Problem) -> bool {
    problem.cols.is_multiple_of(vector(problem, true))
}

fn acc_bytes(problem: &Problem) -> usize {
    problem.stats_dtype().size_in_bytes()
}

/// Threads that hold `vectors` at `per_thread` each, in whole warps.
fn threads_for(vectors: usize, per_thread: usize) -> usize {
    vectors.div_ceil(per_thread).next_multiple_of(WARP)
}

/// The first variant that holds `vectors` in `lanes` lanes.
fn smallest(variants: &[Variant], lanes: usize, vectors: usize) -> Option<Variant> {
    variants
        .iter()
        .copied()
        .find(|v| v.per_thread * lanes >= vectors)
}

/// Lanes for a row, so that each holds about `target` vectors.
fn lanes_for(vectors: usize, target: usize) -> usize {
    vectors.div_ceil(target).next_power_of_two().clamp(4, WARP)
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
            shared: 0,
        })
    }
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

/// What a block of a cluster or a ring uses of shared memory besides its ring, at most, and what the driver reserves.
const STATIC_SHARED: usize = 17 * 1024;
const RESERVED_SHARED: usize = 1024;

// ---- forward --------------------------------------------------------------------------------------------------------

/// Plans a forward pass over a problem that is not empty. `aligned`: every row of every tensor starts on 16 bytes.
pub fn forward(problem: &Problem, aligned: bool, device: &DeviceFacts) -> Result<Forward> {
    check_cols(problem)?;
    let (rows, cols) = (problem.rows, problem.cols);
    let vectors = cols / vector(problem, aligned);
    let size = problem.dtype.size_in_bytes();
    // kLarge and kLargeSingle of forward.cu.
    let large = match (aligned, size) {
        (true, 4) => 8,
        (true, _) => 4,
        (false, 8) => 8,
        (false, _) => 16,
    };
    let variant = |entry, per_thread| Variant { entry, per_thread };

    let warp: &[Variant] = if aligned {
        &[
            variant("forward_warp_wide_quarter", large / 4),
            variant("forward_warp_wide_half", large / 2),
            variant("forward_warp_wide_full", large),
        ]
    } else {
        &[
            variant("forward_warp_single_quarter", large / 4),
            variant("forward_warp_single_half", large / 2),
            variant("forward_warp_single_full", large),
        ]
    };
    // 64 bytes a lane: at 256 columns on an H200, bf16 reaches 82% of the roofline with 8 lanes, 75% with 16, 60% with
    // 32; f32 93%, with 16 lanes or 32.
    let lanes = lanes_for(vectors, if aligned { 4 } else { large / 2 });
    if let Some(v) = smallest(warp, lanes, vectors) {
        let threads = 128;
        let grid = [rows.div_ceil(threads / lanes), 1];
        return Ok(Forward {
            regime: Regime::Warp,
            lanes: lanes as u32,
            tiles: 1,
            launches: vec![Launch::new(
                problem,
                "forward",
                v.entry,
                grid,
                [threads, 1],
            )?],
        });
    }

    // 512 threads leave room for a second block on a multiprocessor; without clusters, a block takes what it can.
    let max_threads = match (aligned, device.base) {
        (true, 90) => 512,
        (true, _) => 1024,
        (false, _) => 640,
    };
    // 64 bytes a thread in all dtypes. f32 takes them as half of 128: 95.1% of the roofline at 8192 columns on an H200,
    // 94.7% in full. bf16 loses 20% with 32 bytes.
    let block: &[Variant] = match (aligned, size) {
        (true, 2) => &[variant("forward_block_wide_full", large)],
        (true, _) => &[
            variant("forward_block_wide_half", large / 2),
            variant("forward_block_wide_full", large),
        ],
        (false, _) => &[variant("forward_block_single_full", large)],
    };
    if let Some(v) = smallest(block, max_threads, vectors) {
        let threads = threads_for(vectors, v.per_thread);
        return Ok(Forward {
            regime: Regime::Block,
            lanes: 0,
            tiles: 1,
            launches: vec![Launch::new(
                problem,
                "forward",
                v.entry,
                [rows, 1],
                [threads, 1],
            )?],
        });
    }

    if device.base >= 90 {
        // kLargeSingle of forward.cu, and its FORWARD_CLUSTER(wide).
        let cluster = if aligned {
            variant("forward_cluster_wide", 4)
        } else {
            variant("forward_cluster_single", large)
        };
        for blocks in [2, 4, 8] {
            let threads = threads_for(vectors.div_ceil(blocks), cluster.per_thread);
            let shared = 6 * threads * cluster.per_thread * (vector(problem, aligned) * size);
            if threads > 512 || shared + STATIC_SHARED > device.shared_per_block {
                continue;
            }
            let resident = (512 / threads)
                .min(device.shared_per_multiprocessor / (shared + STATIC_SHARED + RESERVED_SHARED))
                .max(1);
            let owners = rows.min(resident * clusters(device, blocks));
            let launch = Launch::new(
                problem,
                "forward",
                cluster.entry,
                [owners * blocks, 1],
                [threads, 1],
            )?;
            return Ok(Forward {
                regime: Regime::Cluster,
                lanes: 0,
                tiles: 1,
                launches: vec![Launch {
                    cluster: blocks as u32,
                    shared: shared as u32,
                    ..launch
                }],
            });
        }
    }

    let (threads, [moments, normalize]) = if aligned {
        (384, ["split_moments_wide", "split_normalize_wide"])
    } else {
        (256, ["split_moments_single", "split_normalize_single"])
    };
    let tiles = vectors.div_ceil(threads * large);
    let launch = |entry| Launch::new(problem, "split", entry, [tiles * rows, 1], [threads, 1]);
    Ok(Forward {
        regime: Regime::Split,
        lanes: 0,
        tiles,
        launches: vec![launch(moments)?, launch(normalize)?],
    })
}

// ---- backward -------------------------------------------------------------------------------------------------------

/// Plans a backward pass over a problem that is not empty. `aligned`: every row of every tensor starts on 16 bytes.
pub fn backward(problem: &Problem, aligned: bool, device: &DeviceFacts) -> Result<Backward> {
    check_cols(problem)?;
    let plan = match backward_warp(problem, aligned, device)? {
        Some(plan) => plan,
        None => match backward_block(problem, aligned, device)? {
            Some(plan) => plan,
            None => backward_split(problem, aligned, device)?,
        },
    };
    Ok(plan)
}

fn finalize(problem: &Problem) -> Result<Launch> {
    Launch::new(
        problem,
        "finalize",
        "finalize",
        [problem.cols.div_ceil(32), 2],
        [32, 16],
    )
}

fn backward_warp(
    problem: &Problem,
    aligned: bool,
    device: &DeviceFacts,
) -> Result<Option<Backward>> {
    const THREADS: usize = 256;
    let (cols, size) = (problem.cols, problem.dtype.size_in_bytes());
    let vector = vector(problem, aligned);
    let vectors = cols / vector;
    let variant = |entry, per_thread| Variant { entry, per_thread };
    // kLargeWarp and kLargeSingle of backward.cu; then the blocks a multiprocessor holds by registers.
    let variants: &[Variant] = if aligned {
        let large = if size == 4 { 8 } else { 4 };
        &[
            variant("backward_warp_wide_quarter", large / 4),
            variant("backward_warp_wide_half", large / 2),
            variant("backward_warp_wide_full", large),
        ]
    } else {
        let large = if size == 8 { 8 } else { 16 };
        &[
            variant("backward_warp_single_half", large / 2),
            variant("backward_warp_single_full", large),
        ]
    };
    let lanes = lanes_for(vectors, variants[variants.len() - 2].per_thread);
    let Some(v) = smallest(variants, lanes, vectors) else {
        return Ok(None);
    };
    let by_registers = if v.entry.ends_with("full") { 1 } else { 2 };
    let thread_bytes = v.per_thread * vector * size;
    let ring_rows = if thread_bytes >= 128 { 3 } else { 4 };
    let ring = ring_rows * 2 * THREADS * thread_bytes;
    let shared = ring.max(THREADS / WARP * cols * acc_bytes(problem));
    if shared > device.shared_per_block {
        return Ok(None);
    }
    let resident = by_registers
        .min(device.shared_per_multiprocessor / (shared + RESERVED_SHARED))
        .max(1);
    let owners = problem
        .rows
        .div_ceil(THREADS / lanes)
        .min(device.multiprocessors * resident);
    let launch = Launch::new(problem, "backward", v.entry, [owners, 1], [THREADS, 1])?;
    Ok(Some(Backward {
        regime: Regime::Warp,
        lanes: lanes as u32,
        tiles: 1,
        parts: owners,
        launches: vec![Launch {
            shared: shared as u32,
            ..launch
        }],
        finalize: finalize(problem)?,
    }))
}

fn backward_block(
    problem: &Problem,
    aligned: bool,
    device: &DeviceFacts,
) -> Result<Option<Backward>> {
    let size = problem.dtype.size_in_bytes();
    let vector = vector(problem, aligned);
    let vectors = problem.cols / vector;
    let variant = |entry, per_thread| Variant { entry, per_thread };
    // kLarge and kLargeSingle of backward.cu.
    let large = match (aligned, size) {
        (true, 2) => 2,
        (true, _) => 4,
        (false, 8) => 8,
        (false, _) => 16,
    };
    // kMaxThreads and kMaxThreadsSingle of backward.cu: the threads whose registers a multiprocessor holds.
    let max_threads = match (aligned, size) {
        (true, 8) => 384,
        (true, _) => 512,
        (false, _) => 256,
    };
    // bf16 at 4096 columns on an H200: 81% of the roofline with 32 bytes of x a thread, 71% with 16. f32: 94% with 32, 90%
    // with 64, which a cluster of two does as well.
    let half = variant("backward_block_wide_half", large / 2);
    let full = variant("backward_block_wide_full", large);
    let blocks: &[Variant] = match (aligned, size) {
        (true, 2) => &[full],
        (true, 4) if device.base >= 90 => &[half],
        (true, _) => &[half, full],
        (false, _) => &[variant("backward_block_single_full", large)],
    };
    let cluster = if aligned {
        variant("backward_cluster_wide_full", large)
    } else {
        variant("backward_cluster_single_full", large)
    };
    // The ring's rows, by the bytes of a row that a thread holds: `Ring` of backward.cu.
    let ring_rows = |v: Variant| match (v.per_thread * vector * size >= 64, device.base) {
        (true, 90) => 3,
        (false, 90) => 6,
        (true, _) => 2,
        (false, _) => 3,
    };
    let shared =
        |v: Variant, threads: usize| ring_rows(v) * 2 * threads * v.per_thread * vector * size;
    let plan = |v: Variant, blocks: usize| -> Result<Option<Backward>> {
        let threads = threads_for(vectors.div_ceil(blocks), v.per_thread);
        let shared = shared(v, threads);
        if threads > max_threads || shared + STATIC_SHARED > device.shared_per_block {
            return Ok(None);
        }
        let resident = (max_threads / threads)
            .min(device.shared_per_multiprocessor / (shared + STATIC_SHARED + RESERVED_SHARED))
            .max(1);
        let owners = problem.rows.min(resident * clusters(device, blocks));
        let launch = Launch::new(
            problem,
            "backward",
            v.entry,
            [owners * blocks, 1],
            [threads, 1],
        )?;
        Ok(Some(Backward {
            regime: if blocks == 1 {
                Regime::Block
            } else {
                Regime::Cluster
            },
            lanes: 0,
            tiles: 1,
            parts: owners,
            launches: vec![Launch {
                cluster: blocks as u32,
                shared: shared as u32,
                ..launch
            }],
            finalize: finalize(problem)?,
        }))
    };
    for &v in blocks {
        if let Some(plan) = plan(v, 1)? {
            return Ok(Some(plan));
        }
    }
    if device.base >= 90 {
        for blocks in [2, 4, 8] {
            if let Some(plan) = plan(cluster, blocks)? {
                return Ok(Some(plan));
            }
        }
    }
    Ok(None)
}

/// Clusters that are resident at once, one block a multiprocessor. A cluster lies within a group of multiprocessors, some
/// of which remain over: on an H200 with 132, 66 of 2, 30 of 4 and 15 of 8 were resident.
fn clusters(device: &DeviceFacts, blocks: usize) -> usize {
    let usable = match blocks {
        1 | 2 => device.multiprocessors,
        _ => device.multiprocessors * 10 / 11,
    };
    (usable / blocks).max(1)
}

fn backward_split(problem: &Problem, aligned: bool, device: &DeviceFacts) -> Result<Backward> {
    /// kMaxShare of split.cu.
    const MAX_SHARE: usize = 1024;
    let vectors = problem.cols / vector(problem, aligned);
    // kBackward and kSingle of split.cu.
    let (threads, per_thread, [sums, gradients]) = match (aligned, problem.dtype) {
        (true, DType::F16 | DType::BF16) => (384, 2, ["split_sums_wide", "split_gradients_wide"]),
        (true, _) => (384, 4, ["split_sums_wide", "split_gradients_wide"]),
        (false, DType::F64) => (256, 8, ["split_sums_single", "split_gradients_single"]),
        (false, _) => (256, 16, ["split_sums_single", "split_gradients_single"]),
    };
    let tiles = vectors.div_ceil(threads * per_thread);
    // Two waves of blocks at least, as far as there are rows.
    let shares = (2 * device.multiprocessors)
        .div_ceil(tiles)
        .max(problem.rows.div_ceil(MAX_SHARE))
        .min(problem.rows);
    Ok(Backward {
        regime: Regime::Split,
        lanes: 0,
        tiles,
        parts: shares,
        launches: vec![
            Launch::new(
                problem,
                "split",
                sums,
                [tiles * problem.rows, 1],
                [threads, 1],
            )?,
            Launch::new(problem, "split", gradients, [tiles, shares], [threads, 1])?,
        ],
        finalize: finalize(problem)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: DeviceFacts = DeviceFacts {
        multiprocessors: 132,
        shared_per_block: 227 * 1024,
        shared_per_multiprocessor: 228 * 1024,
        base: 90,
    };
    const A100: DeviceFacts = DeviceFacts {
        multiprocessors: 108,
        shared_per_block: 163 * 1024,
        shared_per_multiprocessor: 164 * 1024,
        base: 80,
    };
    const RTX_4090: DeviceFacts = DeviceFacts {
        multiprocessors: 128,
        shared_per_block: 99 * 1024,
        shared_per_multiprocessor: 100 * 1024,
        base: 80,
    };

    fn problem(rows: usize, cols: usize, dtype: DType) -> Problem {
        Problem {
            rows,
            cols,
            dtype,
            param_dtype: dtype,
            weight: true,
            bias: true,
            remove_mean: true,
            eps: 1e-5,
        }
    }

    /// Vectors a thread of this entry holds, by the kernels' own constants.
    fn per_thread(entry: &str, size: usize) -> usize {
        let full = match entry {
            e if e.contains("single") => {
                if size == 8 {
                    8
                } else {
                    16
                }
            }
            "forward_cluster_wide" => 4,
            e if e.starts_with("forward")
                || e.starts_with("split_mom")
                || e.starts_with("split_norm") =>
            {
                if size == 4 {
                    8
                } else {
                    4
                }
            }
            e if e.starts_with("backward_warp") => {
                if size == 4 {
                    8
                } else {
                    4
                }
            }
            _ => {
                if size == 2 {
                    2
                } else {
                    4
                }
            }
        };
        let fraction = ["full", "half", "quarter", "eighth"]
            .iter()
            .position(|f| entry.ends_with(f))
            .unwrap_or(0);
        full >> fraction
    }

    /// What must hold for a launch, whatever the plan.
    fn check(
        launch: &Launch,
        p: &Problem,
        regime: Regime,
        aligned: bool,
        lanes: u32,
        tiles: usize,
        device: &DeviceFacts,
    ) {
        let size = p.dtype.size_in_bytes();
        let vector = if aligned { 16 / size } else { 1 };
        let threads = launch.block[0] * launch.block[1];
        assert!(threads.is_multiple_of(32) && threads <= 1024, "{launch:?}");
        assert!(
            launch.shared as usize <= device.shared_per_block,
            "{launch:?}"
        );
        assert!(launch.grid[0] >= 1 && launch.grid[1] >= 1, "{launch:?}");
        assert!(launch.cluster == 1 || device.base >= 90, "{launch:?}");
        assert_eq!(launch.grid[0] % launch.cluster, 0, "{launch:?}");
        if launch.file == "finalize" {
            return;
        }
        assert_eq!(launch.entry.contains("wide"), aligned, "{launch:?}");
        let owners = match regime {
            Regime::Warp => lanes,
            Regime::Block => launch.block[0],
            Regime::Cluster => launch.block[0] * launch.cluster,
            Regime::Split => launch.block[0] * tiles as u32,
        };
        let held = owners as usize * per_thread(launch.entry, size) * vector;
        assert!(
            held >= p.cols,
            "{launch:?} holds {held} of {} columns",
            p.cols
        );
    }

    #[test]
    fn every_plan_covers_its_rows() {
        let around = |c: usize| [c - 1, c, c + 1];
        let mut widths = vec![
            1, 2, 3, 5, 7, 769, 1000, 4001, 5120, 12288, 50257, 100003, 1000003, 4194304,
        ];
        widths.extend((3..22).flat_map(|log| around(1 << log)));
        for device in [H200, A100, RTX_4090] {
            for dtype in [DType::F32, DType::BF16, DType::F64] {
                for &cols in &widths {
                    for rows in [1, 2, 31, 132, 4097, 70001] {
                        let p = problem(rows, cols, dtype);
                        for aligned in [false, rows_align(&p)] {
                            let f = forward(&p, aligned, &device).unwrap();
                            assert_eq!(
                                f.launches.len(),
                                if f.regime == Regime::Split { 2 } else { 1 }
                            );
                            for launch in &f.launches {
                                check(launch, &p, f.regime, aligned, f.lanes, f.tiles, &device);
                            }
                            let b = backward(&p, aligned, &device).unwrap();
                            assert!(b.parts >= 1 && b.parts <= rows, "{b:?}");
                            for launch in b.launches.iter().chain([&b.finalize]) {
                                check(launch, &p, b.regime, aligned, b.lanes, b.tiles, &device);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn regimes_change_where_documented() {
        use Regime::{Block, Cluster, Split, Warp};
        let of = |dtype, cols, device: &DeviceFacts| {
            let p = problem(1024, cols, dtype);
            (
                forward(&p, true, device).unwrap().regime,
                backward(&p, true, device).unwrap().regime,
            )
        };
        for (dtype, cols, expected) in [
            (DType::F32, 1024, (Warp, Warp)),
            (DType::F32, 1028, (Block, Block)),
            (DType::F32, 4096, (Block, Block)),
            (DType::F32, 4100, (Block, Cluster)),
            (DType::F32, 16384, (Block, Cluster)),
            (DType::F32, 16388, (Cluster, Cluster)),
            (DType::F32, 65536, (Cluster, Cluster)),
            (DType::F32, 65540, (Split, Split)),
            (DType::BF16, 1024, (Warp, Warp)),
            (DType::BF16, 1032, (Block, Block)),
            (DType::BF16, 8200, (Block, Cluster)),
            (DType::BF16, 16392, (Cluster, Cluster)),
            (DType::BF16, 65544, (Cluster, Split)),
            (DType::BF16, 131080, (Split, Split)),
            (DType::F64, 256, (Warp, Warp)),
            (DType::F64, 258, (Block, Block)),
            (DType::F64, 3074, (Block, Cluster)),
            (DType::F64, 4098, (Cluster, Cluster)),
        ] {
            assert_eq!(of(dtype, cols, &H200), expected, "{dtype:?} {cols}");
        }
        // No clusters before compute capability 9.0.
        assert_eq!(of(DType::F32, 32768, &A100), (Block, Split));
        assert_eq!(of(DType::F32, 32772, &RTX_4090), (Split, Split));
    }

    #[test]
    fn unaligned_rows_take_single_elements() {
        let p = problem(64, 50257, DType::F16);
        assert!(!rows_align(&p));
        let plan = forward(&p, false, &H200).unwrap();
        assert_eq!(plan.launches[0].entry, "forward_cluster_single");
    }

    #[test]
    fn few_giant_rows_have_one_part() {
        let p = problem(16, 4194304, DType::F32);
        let plan = backward(&p, true, &H200).unwrap();
        assert_eq!(
            (plan.regime, plan.parts, plan.tiles),
            (Regime::Split, 1, 683)
        );
        assert_eq!(plan.launches[1].grid, [683, 1]);
    }

    #[test]
    fn columns_beyond_32_bits_are_refused() {
        let p = problem(1, 1 << 31, DType::BF16);
        let error = forward(&p, true, &H200).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "layer-norm: xs: expected rows of at most 2^31 - 1 columns on CUDA, got 2147483648"
            ),
            "{error}"
        );
    }
}
