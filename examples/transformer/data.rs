//! Text as characters, split into a part to train on and a part held out.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use rand::Rng;
use std::{collections::BTreeSet, path::Path};

/// This crate's own documents and sources.
const BUILT_IN: &[&str] = &[
    include_str!("../../README.md"),
    include_str!("../../src/lib.rs"),
    include_str!("../../src/layer_norm.rs"),
    include_str!("../../src/ops.rs"),
    include_str!("../../src/op.rs"),
    include_str!("../../src/problem.rs"),
    include_str!("../../src/composed.rs"),
    include_str!("../../src/plan.rs"),
    include_str!("../../src/cpu/mod.rs"),
    include_str!("../../src/cpu/row.rs"),
    include_str!("../../src/cpu/element.rs"),
    include_str!("main.rs"),
    include_str!("model.rs"),
    include_str!("data.rs"),
    include_str!("train.rs"),
];

/// The characters that the model knows. The id of a character is its place among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary(Vec<char>);

impl Vocabulary {
    /// The characters of `text`, each once, in the order of their code points.
    pub fn of(text: &str) -> Self {
        Self(text.chars().collect::<BTreeSet<_>>().into_iter().collect())
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        text.chars()
            .map(|c| match self.0.binary_search(&c) {
                Ok(id) => Ok(id as u32),
                Err(_) => bail!(
                    "{c:?} is not among the {} characters of the vocabulary",
                    self.len()
                ),
            })
            .collect()
    }

    /// `ids` as text for a terminal: control codes are shown as replacement characters.
    pub fn decode(&self, ids: &[u32]) -> String {
        ids.iter()
            .filter_map(|&id| self.0.get(id as usize))
            .map(|&c| match c {
                '\n' | '\t' => c,
                c if c.is_control() => char::REPLACEMENT_CHARACTER,
                c => c,
            })
            .collect()
    }

    /// All characters in order, from which [`of`](Self::of) makes the vocabulary again.
    pub fn text(&self) -> String {
        self.0.iter().collect()
    }
}

pub struct Corpus {
    pub train: Vec<u32>,
    pub held_out: Vec<u32>,
    pub vocabulary: Vocabulary,
}

impl Corpus {
    /// The text in the file at `path`, or the built-in one, with its characters as the vocabulary unless one is given.
    pub fn load(
        path: Option<&Path>,
        context: usize,
        vocabulary: Option<Vocabulary>,
    ) -> Result<Self> {
        let Some(path) = path else {
            return Self::split(BUILT_IN.iter().copied(), context, vocabulary)
                .context("the built-in text cannot be used");
        };
        let name = path.display();
        let text = std::fs::read(path)
            .with_context(|| format!("cannot read {name}: give --text a readable file"))?;
        let text = String::from_utf8(text)
            .with_context(|| format!("{name} is not text in UTF-8: give --text such a file"))?;
        ensure!(
            !text.is_empty(),
            "{name} is empty: give --text a file with text in it"
        );
        Self::split([text.as_str()], context, vocabulary)
            .with_context(|| format!("{name} cannot be used"))
    }

    /// Holds out the last tenth of each document.
    ///
    /// By position, not at random: text repeats itself nearby, so windows drawn from all of it would let the model see
    /// the surroundings of what it is tested on. In each document, not in all of them joined: the last tenth of that
    /// would be a single file, unlike the others.
    fn split<'a>(
        documents: impl IntoIterator<Item = &'a str>,
        context: usize,
        vocabulary: Option<Vocabulary>,
    ) -> Result<Self> {
        let documents: Vec<&str> = documents.into_iter().collect();
        let vocabulary = vocabulary.unwrap_or_else(|| Vocabulary::of(&documents.concat()));
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for document in documents {
            let ids = vocabulary.encode(document)?;
            let (head, tail) = ids.split_at(ids.len() * 9 / 10);
            train.extend_from_slice(head);
            held_out.extend_from_slice(tail);
        }
        ensure!(
            held_out.len() > context,
            "the tenth that is held out has {} characters, --context {context} needs {}: give --text a file of at least \
             {} characters or lower --context",
            held_out.len(),
            context + 1,
            10 * context + 1,
        );
        Ok(Self {
            train,
            held_out,
            vocabulary,
        })
    }

    /// Fails unless this is the text of `fingerprint`, that of a checkpoint.
    pub fn ensure_is(&self, fingerprint: &str) -> Result<()> {
        ensure!(
            self.fingerprint() == fingerprint,
            "the checkpoint was trained on another text: give --text the same one (without --text it is this crate's own \
             sources, which may have changed)"
        );
        Ok(())
    }

    /// FNV-1a over both parts: tells whether a checkpoint was trained on this text.
    pub fn fingerprint(&self) -> String {
        let ids = self.train.iter().chain(&self.held_out);
        let bytes = ids.flat_map(|id| id.to_le_bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("{hash:016x}")
    }
}

/// The windows of `context` tokens that begin at `starts`, and the tokens that follow each of theirs, both
/// `[starts.len(), context]`. One upload for both.
pub fn windows(
    ids: &[u32],
    starts: &[usize],
    context: usize,
    device: &Device,
) -> candle_core::Result<(Tensor, Tensor)> {
    let windows: Vec<u32> = starts
        .iter()
        .flat_map(|&start| &ids[start..][..=context])
        .copied()
        .collect();
    let windows = Tensor::from_vec(windows, (starts.len(), context + 1), device)?;
    Ok((
        windows.narrow(1, 0, context)?.contiguous()?,
        windows.narrow(1, 1, context)?.contiguous()?,
    ))
}

/// Where `count` windows begin, drawn from all of `ids`, which must be longer than `context`.
pub fn random_starts(ids: &[u32], count: usize, context: usize, rng: &mut impl Rng) -> Vec<usize> {
    (0..count)
        .map(|_| rng.random_range(..ids.len() - context))
        .collect()
}

/// A batch of an evaluation: windows of one length, of whose tokens the last `counted` are predicted for the result, and
/// those before them only read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalBatch {
    pub starts: Vec<usize>,
    pub length: usize,
    pub counted: usize,
}

/// Batches that predict each of `len` tokens but the first exactly once: `stride` of them in a window, which before those
/// reads `context - stride` more, as far as there are as many. With a stride of `context` the windows lie side by side.
pub fn eval_batches(
    len: usize,
    context: usize,
    stride: usize,
    batch_size: usize,
) -> Vec<EvalBatch> {
    let targets = len - 1;
    let mut batches: Vec<EvalBatch> = Vec::new();
    for begin in (0..targets).step_by(stride) {
        let counted = stride.min(targets - begin);
        let start = begin.saturating_sub(context - stride);
        let length = begin + counted - start;
        match batches.last_mut() {
            Some(last)
                if (last.length, last.counted) == (length, counted)
                    && last.starts.len() < batch_size =>
            {
                last.starts.push(start);
            }
            _ => batches.push(EvalBatch {
                starts: vec![start],
                length,
                counted,
            }),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_each_document_once_in_order() {
        let text: String = (' '..).take(60).collect();
        let corpus = Corpus::split([&text[..40], &text[40..]], 4, None).unwrap();
        let decode = |ids: &[u32]| corpus.vocabulary.decode(ids);
        assert_eq!(decode(&corpus.train), [&text[..36], &text[40..58]].concat());
        assert_eq!(
            decode(&corpus.held_out),
            [&text[36..40], &text[58..]].concat()
        );
    }

    #[test]
    fn the_length_that_the_error_names_is_enough() {
        let text = "a".repeat(10 * 64 + 1);
        assert!(Corpus::split([text.as_str()], 64, None).is_ok());
        assert!(Corpus::split([&text[1..]], 64, None).is_err());
    }

    #[test]
    fn a_vocabulary_survives_and_rejects_what_it_lacks() {
        let vocabulary = Vocabulary::of("hällo\n");
        assert_eq!(vocabulary.len(), 5);
        assert_eq!(Vocabulary::of(&vocabulary.text()), vocabulary);
        let ids = vocabulary
            .encode("hallo".replace('a', "ä").as_str())
            .unwrap();
        assert_eq!(vocabulary.decode(&ids), "hällo");
        let error = vocabulary.encode("hallo").unwrap_err().to_string();
        assert_eq!(error, "'a' is not among the 5 characters of the vocabulary");
    }

    #[test]
    fn targets_are_the_next_tokens() {
        let ids: Vec<u32> = (0..8).collect();
        let (inputs, targets) = windows(&ids, &[0, 4], 3, &Device::Cpu).unwrap();
        let values = |tensor: Tensor| tensor.to_vec2::<u32>().unwrap();
        assert_eq!(values(inputs), [[0, 1, 2], [4, 5, 6]]);
        assert_eq!(values(targets), [[1, 2, 3], [5, 6, 7]]);
    }

    #[test]
    fn random_windows_stay_inside_the_text() {
        let mut rng = rand::rng();
        for len in 5..60 {
            let ids = vec![0; len];
            let starts = random_starts(&ids, 100, 4, &mut rng);
            windows(&ids, &starts, 4, &Device::Cpu).unwrap();
        }
    }

    #[test]
    fn an_evaluation_predicts_every_token_once() {
        for len in 5..60 {
            for stride in 1..=4 {
                let mut predicted = vec![0; len];
                for batch in eval_batches(len, 4, stride, 3) {
                    assert!(batch.starts.len() <= 3 && batch.length <= 4);
                    for start in batch.starts {
                        let end = start + batch.length;
                        let first = end + 1 - batch.counted;
                        assert!(
                            first - start > (4 - stride).min(first - 1),
                            "{len} {stride}"
                        );
                        for count in &mut predicted[first..=end] {
                            *count += 1;
                        }
                    }
                }
                assert_eq!(predicted[0], 0);
                assert!(
                    predicted[1..].iter().all(|&count| count == 1),
                    "{len} {stride}"
                );
            }
        }
    }

    #[test]
    fn a_sample_cannot_send_control_codes() {
        let vocabulary = Vocabulary::of("a\n\x1b[2J");
        let ids = vocabulary.encode("a\n\x1b[2J").unwrap();
        assert_eq!(vocabulary.decode(&ids), "a\n\u{fffd}[2J");
    }
}
