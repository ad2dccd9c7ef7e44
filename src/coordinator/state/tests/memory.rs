use crate::{
    coordinator::state::Event,
    model::{Footprint, GpuFootprint, GpuRows},
    protocol::{
        ClientRequest, ClientResponse, CreateRun, GpuMemory, NodeHello, NodeId, NodeMemory, Operation,
    },
    types::LoraConfig,
};

use super::desk::*;

const GIB: u64 = 1 << 30;

/// A node of a model that takes 2 GiB, 2^20 values of an adapter on each target for each unit of
/// rank, and a quarter of a GiB a row.
///
/// At rank 8 an adapter is 7/32 GiB: its state takes 0.875 GiB, and 3.0625 GiB are kept for what
/// an operation makes of it. So a rank alone needs 5.9375 GiB and a quarter for each token.
fn node(name: &str, trainers: u32, samplers: u32, machine_bytes: u64) -> NodeHello {
    let mut hello = hello(name, trainers, samplers);
    hello.models[0].footprint = Footprint {
        weights: 2 * GIB,
        adapter_values: [1 << 20; 8],
        row: GIB / 4,
        row_of_rank: 0,
        workspace: 0,
        checkpointed: None,
    };
    hello.memory = Some(NodeMemory { machine_bytes, cache_bytes: GIB });
    hello
}

fn desk(nodes: &[NodeHello]) -> Desk {
    let mut desk = Desk::new();
    for (i, hello) in nodes.iter().enumerate() {
        desk.feed(Event::NodeJoined { node: NodeId(i as u32 + 1), hello: hello.clone() });
    }
    desk
}

/// Asks for a run with micro-batches of 4 tokens.
fn create_with(desk: &mut Desk, change: impl FnOnce(&mut CreateRun)) -> ClientResponse {
    let ClientResponse::Session(session) = desk.asked(ClientRequest::CreateSession) else {
        panic!("no session")
    };
    let mut create = create(session, Some(1));
    create.micro_batch_tokens = Some(4);
    change(&mut create);
    desk.asked(ClientRequest::CreateRun(create))
}

fn granted(response: ClientResponse) -> u32 {
    match response {
        ClientResponse::Run(run) => run.max_seq_len,
        other => panic!("refused: {other:?}"),
    }
}

fn refused(response: ClientResponse) -> String {
    match response {
        ClientResponse::Error(error) => error.message,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn refuses_sequences_that_fit_no_node_and_says_what_does() {
    let mut desk = desk(&[node("a", 1, 0, 11 * GIB)]);
    let error = refused(create_with(&mut desk, |create| create.max_seq_len = Some(32)));
    assert!(
        error.starts_with("`max_seq_len`: 32 tokens need 13.938 GiB on node a (weights 2.000"),
        "{error}"
    );
    assert!(error.ends_with("which has 11.000 GiB for them; at most 20 tokens fit"), "{error}");
    assert_eq!(granted(create_with(&mut desk, |create| create.max_seq_len = Some(20))), 20);
}

#[test]
fn says_when_recomputation_would_make_it_fit() {
    let with = |row| {
        let mut node = node("a", 1, 0, 11 * GIB);
        node.models[0].footprint.checkpointed = Some((row, 0));
        desk(&[node])
    };
    // 5.9375 GiB, and 32 tokens of an eighth of a GiB, or of a fifth.
    let error = refused(create_with(&mut with(GIB / 8), |create| create.max_seq_len = Some(32)));
    let hint = "at most 20 tokens fit; all fit if the nodes are started with --activation-checkpointing";
    assert!(error.ends_with(hint), "{error}");
    let error = refused(create_with(&mut with(GIB / 5), |create| create.max_seq_len = Some(32)));
    assert!(error.ends_with("at most 20 tokens fit"), "{error}");
    let error = refused(create_with(&mut with(GIB / 8), |create| create.micro_batch_tokens = Some(32)));
    assert!(error.ends_with("--activation-checkpointing"), "{error}");
}

#[test]
fn gives_three_quarters_to_whom_does_not_say() {
    let mut desk = desk(&[node("a", 1, 0, 11 * GIB)]);
    assert_eq!(granted(create_with(&mut desk, |_| {})), 9, "8.25 GiB less 5.9375, in quarters");
    assert_eq!(granted(create_with(&mut self::desk(&[node("a", 1, 0, 64 * GIB)]), |_| {})), 32);
    // A micro-batch that needs more than three quarters is had all the same.
    let mut tight = self::desk(&[node("a", 1, 0, 7 * GIB)]);
    assert_eq!(granted(create_with(&mut tight, |_| {})), 4);
    let mut unknown = node("a", 1, 0, 0);
    unknown.memory = None;
    assert_eq!(granted(create_with(&mut self::desk(&[unknown]), |_| {})), 32);
}

#[test]
fn refuses_a_run_whose_least_fits_no_node() {
    let mut desk = desk(&[node("a", 1, 0, 11 * GIB)]);
    let error = refused(create_with(&mut desk, |create| create.micro_batch_tokens = Some(21)));
    assert!(error.starts_with("`micro_batch_tokens`: 21 tokens need 11.188 GiB"), "{error}");
    let error = refused(create_with(&mut desk, |create| create.lora.rank = 64));
    assert!(error.contains("choose a smaller rank"), "{error}");
}

/// The longest sequence that so many ranks may have, where 32 tokens don't fit.
fn most(desk: &mut Desk, replicas: u32) -> String {
    let error = refused(create_with(desk, |create| {
        create.max_seq_len = Some(32);
        create.replicas = Some(replicas);
    }));
    error.rsplit_once("; ").unwrap().1.to_owned()
}

#[test]
fn nodes_of_one_machine_and_the_caches_of_replicas_share_its_memory() {
    let mut nodes = [node("a", 1, 0, 22 * GIB), node("b", 1, 0, 22 * GIB)];
    nodes.iter_mut().for_each(|node| node.host = "machine".to_owned());
    assert_eq!(most(&mut desk(&nodes), 1), "at most 20 tokens fit");
    nodes.iter_mut().for_each(|node| node.samplers = 1);
    assert_eq!(most(&mut desk(&nodes), 1), "at most 16 tokens fit");
}

#[test]
fn ranks_of_one_node_share_its_weights_alone() {
    // Two states and two ranks at work beside the weights: 9.875 GiB, and half a GiB a token.
    let mut two = desk(&[node("a", 2, 0, 14 * GIB)]);
    assert_eq!(most(&mut two, 2), "at most 8 tokens fit");
    let mut spread = desk(&[node("a", 1, 0, 11 * GIB), node("b", 1, 0, 11 * GIB)]);
    assert_eq!(most(&mut spread, 2), "at most 20 tokens fit");
}

#[test]
fn a_run_that_is_held_takes_its_state() {
    let mut desk = desk(&[node("a", 1, 0, 11 * GIB)]);
    assert_eq!(granted(create_with(&mut desk, |create| create.max_seq_len = Some(8))), 8);
    desk.submit(1, init());
    // The state of the first, 0.875 GiB, is three and a half tokens of the second.
    assert_eq!(most(&mut desk, 1), "at most 16 tokens fit");
}

#[test]
fn a_larger_adapter_is_reckoned_with_before_it_takes_the_place_of_the_first() {
    let mut desk = desk(&[node("a", 1, 0, 11 * GIB)]);
    assert_eq!(granted(create_with(&mut desk, |create| create.max_seq_len = Some(16))), 16);
    desk.submit(1, init());
    let with_rank = |rank| Operation::Init { lora: LoraConfig::new(rank, 1) };
    // 2 GiB of weights, 4 of tokens, and 0.492 for each unit of the rank.
    let error = refused(desk.submit(2, with_rank(11)));
    assert!(error.starts_with("`lora.rank`: 16 tokens need 11.414 GiB"), "{error}");
    assert!(error.ends_with("choose a smaller rank, fewer targets or smaller micro-batches"), "{error}");
    assert!(matches!(desk.submit(3, with_rank(10)), ClientResponse::Accepted { .. }));
}

/// A node as above whose GPU computes: of it the model takes 1 GiB, an adapter at rank 8 four versions of 7/64 GiB and its
/// gradient twice that much, and a token a quarter of a GiB kept and an eighth while a layer is on its way back. So a
/// rank alone needs 1.65625 GiB and three eighths for each token, and of the host 5.9375 GiB.
fn gpu_node(name: &str, trainers: u32, gpu_bytes: u64) -> NodeHello {
    let mut hello = node(name, trainers, 0, 11 * GIB);
    let model = &mut hello.models[0];
    model.footprint.row = 0;
    let rows = GpuRows { kept: GIB / 4, kept_of_rank: 0, passing: GIB / 8, passing_of_rank: 0 };
    model.gpu_footprint = Some(GpuFootprint {
        weights: GIB,
        steps: 0,
        element: 2,
        rows,
        checkpointed: None,
        head_rows: 2,
        head: GIB / 8,
        head_of_rank: 0,
        workspace: 0,
    });
    hello.gpu_memory = Some(GpuMemory { gpu: "GPU-1".into(), bytes: gpu_bytes, cache_bytes: GIB / 2 });
    hello
}

#[test]
fn a_run_on_a_gpu_must_fit_its_memory() {
    let mut desk = desk(&[gpu_node("a", 1, 5 * GIB)]);
    let error = refused(create_with(&mut desk, |create| create.max_seq_len = Some(32)));
    assert!(
        error.starts_with(
            "`max_seq_len`: 32 tokens need 13.656 GiB of the GPU's memory on node a (weights 1.000, runs that it holds \
             0.000, this run's adapter 0.438, the rest for the micro-batch at work), which has 5.000 GiB"
        ),
        "{error}"
    );
    // Of 3.34375 GiB.
    assert!(error.ends_with("at most 8 tokens fit"), "{error}");
    assert_eq!(granted(create_with(&mut desk, |create| create.max_seq_len = Some(8))), 8);
    let mut unasked = self::desk(&[gpu_node("a", 1, 8 * GIB)]);
    assert_eq!(granted(create_with(&mut unasked, |_| {})), 11, "6 GiB less 1.65625, in three eighths");
}

#[test]
fn ranks_of_a_gpu_take_turns_and_nodes_of_it_share_it() {
    // A second rank takes a second state alone: 3.34375 GiB less 0.4375 of it.
    let with_host = |mut node: NodeHello| {
        node.memory = Some(NodeMemory { machine_bytes: 64 * GIB, cache_bytes: 0 });
        node
    };
    assert_eq!(most(&mut desk(&[with_host(gpu_node("a", 2, 5 * GIB))]), 2), "at most 7 tokens fit");
    let mut two = [with_host(gpu_node("a", 1, 10 * GIB)), with_host(gpu_node("b", 1, 10 * GIB))];
    two.iter_mut().for_each(|node| node.host = "machine".to_owned());
    assert_eq!(most(&mut desk(&two), 1), "at most 8 tokens fit");
    two.iter_mut().for_each(|node| node.samplers = 1);
    assert_eq!(most(&mut desk(&two), 1), "at most 7 tokens fit");
    two[1].gpu_memory.as_mut().unwrap().gpu = "GPU-2".to_owned();
    assert_eq!(most(&mut desk(&two), 1), "at most 20 tokens fit");
}

/// A rank with a GPU of its own keeps three vectors of 7/32 GiB for the sums over NCCL, and two pieces of 1/64: 0.6875 GiB.
#[test]
fn ranks_on_two_gpus_keep_memory_for_their_sums() {
    let own = |name: &str| {
        let mut node = gpu_node(name, 1, 5 * GIB);
        node.memory = Some(NodeMemory { machine_bytes: 64 * GIB, cache_bytes: 0 });
        node
    };
    let mut two = desk(&[own("a"), own("b")]);
    let error = refused(create_with(&mut two, |create| {
        create.max_seq_len = Some(32);
        create.replicas = Some(2);
    }));
    assert!(error.contains("this run's adapter and sums over NCCL 1.125, the rest"), "{error}");
    // Of 2.65625 GiB: one that is alone has 3.34375.
    assert!(error.ends_with("at most 7 tokens fit"), "{error}");
    assert_eq!(most(&mut two, 1), "at most 8 tokens fit");
}

#[test]
fn the_host_of_a_gpu_holds_the_moments() {
    let mut small = gpu_node("a", 1, 64 * GIB);
    small.memory = Some(NodeMemory { machine_bytes: 5 * GIB, cache_bytes: 0 });
    let error = refused(create_with(&mut desk(&[small]), |create| create.max_seq_len = Some(8)));
    assert!(error.contains("tokens need 5.938 GiB on node a (weights 2.000"), "{error}");
}
