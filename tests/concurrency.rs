//! Promise: calls from any threads, of any pool, on shared tensors and shared graphs, give what they give alone.

mod common;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use common::case::{Case, Dtypes, Kind, Outputs, Tracked, loss};
use common::compare::assert_same_bits;
use common::devices::devices;
use rayon::prelude::*;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

/// On one thread, by rows, and by columns.
const SHAPES: [[usize; 2]; 3] = [[31, 200], [300, 700], [3, 40001]];

/// A graph of one call: its variables, and its loss.
struct Graph {
    case: Case,
    vars: Vec<Var>,
    loss: Tensor,
}

impl Graph {
    fn new(case: Case, device: &candle_core::Device) -> Result<Self> {
        let var = |tensor: Option<Tensor>| tensor.map(|t| Var::from_tensor(&t)).transpose();
        let xs = Var::from_tensor(&case.xs(device)?)?;
        let (weight, bias) = (var(case.weight(device)?)?, var(case.bias(device)?)?);
        let y = case.apply(&xs, weight.as_deref(), bias.as_deref())?;
        let loss = loss(&y, &case.dy(device)?)?;
        let vars = [Some(xs), weight, bias].into_iter().flatten().collect();
        Ok(Self { case, vars, loss })
    }

    fn gradients(&self) -> Result<Vec<Tensor>> {
        let grads = self.loss.backward()?;
        let of = |var| grads.get(var).cloned().expect("all variables are tracked");
        Ok(self.vars.iter().map(|var| of(var.as_tensor())).collect())
    }

    fn check(&self, gradients: &[Tensor], want: &[Tensor]) {
        for (got, want) in gradients.iter().zip(want) {
            assert_same_bits(&self.case, "gradient", got, want);
        }
    }
}

fn cases() -> impl Iterator<Item = Case> {
    SHAPES.iter().flat_map(|shape| {
        [Dtypes::F32, Dtypes::BF16_F32]
            .into_iter()
            .flat_map(move |dtypes| Kind::ALL.map(|kind| Case::random(kind, dtypes, shape, 1)))
    })
}

/// Statistics are kept by the forward's thread and read by the backward's.
#[test]
fn forward_on_one_thread_and_backward_on_another() -> Result<()> {
    for device in devices() {
        let (send, receive) = mpsc::sync_channel::<Graph>(2);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for case in cases() {
                    let graph = Graph::new(case, device).expect("a forward pass");
                    send.send(graph).expect("the other thread receives");
                }
            });
            let backward = scope.spawn(move || {
                let mut passes = 0;
                for graph in receive {
                    let outputs = graph.gradients().expect("a backward pass");
                    let here = Graph::new(graph.case.clone(), device).expect("a forward pass");
                    graph.check(&outputs, &here.gradients().expect("a backward pass"));
                    passes += 1;
                }
                passes
            });
            assert_eq!(backward.join().expect("no panic"), cases().count());
        });
    }
    Ok(())
}

#[test]
fn many_threads_go_back_over_one_graph() -> Result<()> {
    for device in devices() {
        for case in cases() {
            let graph = Graph::new(case, device)?;
            let want = graph.gradients()?;
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        graph.check(&graph.gradients().expect("a backward pass"), &want);
                    });
                }
            });
        }
    }
    Ok(())
}

/// As data-parallel workers do: each its own xs, all the same weight and bias.
#[test]
fn many_threads_share_weight_and_bias() -> Result<()> {
    const THREADS: usize = 8;
    for device in devices() {
        for shape in SHAPES {
            let shared = Case::random(Kind::LayerNorm, Dtypes::F32, &shape, 1);
            let var = |param: Option<Tensor>| Var::from_tensor(&param.expect("a layer norm"));
            let (weight, bias) = (var(shared.weight(device)?)?, var(shared.bias(device)?)?);
            std::thread::scope(|scope| {
                for thread in 0..THREADS {
                    let (shared, weight, bias) = (&shared, &weight, &bias);
                    scope.spawn(move || {
                        let mut case = shared.clone();
                        case.x.rotate_left(thread);
                        case.dy.rotate_right(thread);
                        for _ in 0..5 {
                            let outputs = case
                                .gradients_of(device, Tracked::ALL, |xs, _, _| {
                                    case.apply(xs, Some(weight), Some(bias))
                                })
                                .expect("a call");
                            let only_xs = common::case::Outputs {
                                dweight: None,
                                dbias: None,
                                ..outputs
                            };
                            let tracked = Tracked {
                                xs: true,
                                ..Tracked::NONE
                            };
                            case.check(device, tracked, &only_xs);
                        }
                    });
                }
            });
        }
    }
    Ok(())
}

/// A pool whose threads all call the op, which shares its work out in the same pool.
#[test]
fn calls_from_inside_a_pool_of_the_caller() -> Result<()> {
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()?;
        for device in devices() {
            let cases: Vec<_> = cases().collect();
            let alone = cases
                .iter()
                .map(|case| case.gradients(device))
                .collect::<Result<Vec<_>, _>>()?;
            pool.install(|| {
                (0..4 * cases.len()).into_par_iter().for_each(|index| {
                    let (case, want) = (&cases[index % cases.len()], &alone[index % cases.len()]);
                    let got = case.gradients(device).expect("a call");
                    assert_same_bits(case, "y", &got.y, &want.y);
                    for (got, want) in [
                        (&got.dx, &want.dx),
                        (&got.dweight, &want.dweight),
                        (&got.dbias, &want.dbias),
                    ] {
                        match (got, want) {
                            (Some(got), Some(want)) => {
                                assert_same_bits(case, "gradient", got, want)
                            }
                            (None, None) => {}
                            _ => panic!("{case}: a gradient in one of two calls"),
                        }
                    }
                });
            });
        }
    }
    Ok(())
}

/// The gradients of `cases`, on a thread of its own, while no thread of the global pool is free: they must come all the same.
fn check_while_the_pool_is_busy(
    cases: Vec<Case>,
    gradients: impl Fn(&Case) -> candle_core::Result<Outputs> + Send + 'static,
) -> Result<()> {
    // Two that wait for all of its threads would each keep some.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let gate = Arc::new(RwLock::new(()));
    let held = gate.write().expect("nothing panicked there");
    let (arrive, arrived) = mpsc::channel();
    let (waiting, threads) = (gate.clone(), rayon::current_num_threads());
    rayon::spawn_broadcast(move |_| {
        arrive.send(()).expect("the test waits");
        drop(waiting.read());
    });
    arrived.iter().take(threads).for_each(drop);
    let (send, receive) = mpsc::channel();
    let count = cases.len();
    std::thread::spawn(move || {
        for case in cases {
            let outputs = gradients(&case);
            send.send((case, outputs)).expect("the test waits");
        }
    });
    let mut ended = Vec::new();
    let stuck = loop {
        match receive.recv_timeout(Duration::from_secs(60)) {
            Ok(one) => ended.push(one),
            Err(error) => break error == RecvTimeoutError::Timeout,
        }
    };
    drop(held);
    assert!(!stuck, "a call waits for the pool");
    assert_eq!(ended.len(), count, "a call panicked");
    for (case, outputs) in ended {
        case.check(&Device::Cpu, Tracked::ALL, &outputs?);
    }
    Ok(())
}

#[test]
fn small_calls_stay_on_the_thread_of_the_caller() -> Result<()> {
    let cases = Kind::ALL.into_iter().flat_map(|kind| {
        [[32, 1024], [1, 32768], [1024, 32]].map(|s| Case::random(kind, Dtypes::F32, &s, 1))
    });
    check_while_the_pool_is_busy(cases.collect(), |case| case.gradients(&Device::Cpu))
}

#[test]
fn calls_run_in_the_pool_of_the_caller() -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    let cases = SHAPES.map(|shape| Case::random(Kind::LayerNorm, Dtypes::F32, &shape, 1));
    check_while_the_pool_is_busy(cases.into(), move |case| {
        pool.install(|| case.gradients(&Device::Cpu))
    })
}
