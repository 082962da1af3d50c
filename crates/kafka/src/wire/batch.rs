//! Record batches as Kafka keeps them (format 2), written as the records come: no copy of a record is made but the one
//! that is compressed.
//!
//! ```text
//! offset 8 │ length 4 │ leader epoch 4 │ magic 1 │ CRC-32C 4 │ attributes 2 │ last offset delta 4 │
//! first time 8 │ greatest time 8 │ producer id 8 │ producer epoch 2 │ first sequence 4 │ count 4 │ records, compressed
//! ```
//!
//! The CRC is of everything behind it; the length, of everything behind the length.

use std::io::Write;

use bytes::Bytes;
use change::Refusal;
use lz4::block::{CompressionMode, compress_bound, compress_to_buffer};

/// Bytes before the records.
pub(super) const HEADER_LEN: usize = 61;
pub(super) const LENGTH_AT: usize = 8;
pub(super) const CRC_AT: usize = 17;
pub(super) const MAGIC: u8 = 2;
/// Bit of the attributes: the batch is part of a transaction.
pub(super) const TRANSACTIONAL: i16 = 0x10;
/// Bytes of a key that an error message shows.
const KEY_SHOWN_LEN: usize = 200;

/// How a batch is compressed, as the property `compression.type` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Compression {
    None,
    #[default]
    Lz4,
}

impl Compression {
    pub(crate) fn parse(name: &str) -> Result<Self, Refusal> {
        match name {
            "none" => Ok(Compression::None),
            "lz4" | "inherit" => Ok(Compression::Lz4),
            other => Err(Refusal::new(
                format!("[kafka.properties] has compression.type `{other}`, which Millrace does not write"),
                "use `lz4` or `none`; the topic's own compression.type makes the broker write any other",
            )),
        }
    }

    fn attributes(self) -> i16 {
        match self {
            Compression::None => 0,
            Compression::Lz4 => 3,
        }
    }
}

/// Who writes: what the coordinator gave to this producer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ProducerId {
    pub(crate) id: i64,
    pub(crate) epoch: i16,
}

/// A record that is being added.
pub(crate) struct Record<'a> {
    pub(crate) key: Option<&'a [u8]>,
    pub(crate) value: Option<&'a [u8]>,
    /// Milliseconds since the epoch.
    pub(crate) timestamp_ms: i64,
}

/// A batch that is being written.
pub(crate) struct Batch {
    body: Body,
    compression: Compression,
    count: i32,
    len: usize,
    first_ms: i64,
    greatest_ms: i64,
    largest: Largest,
    /// The headers of the record that comes next, and how many.
    headers: (Vec<u8>, u8),
    scratch: Vec<u8>,
}

/// The record that is at fault where a batch is too large.
#[derive(Default)]
pub(crate) struct Largest {
    /// Its key, lossily and not more than is worth showing.
    pub(crate) key: String,
    /// Bytes of its key and value.
    pub(crate) len: usize,
}

/// A batch that can be sent.
pub(crate) struct Written {
    pub(crate) bytes: Bytes,
    pub(crate) count: i32,
    pub(crate) largest: Largest,
}

enum Body {
    Plain(Vec<u8>),
    Lz4(Frame),
}

/// LZ4's frame around blocks, as brokers read it: of 64 KiB each, that do not depend on each other, without checksums.
/// <https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md>
struct Frame {
    to: Vec<u8>,
    /// The block that is being filled.
    block: Vec<u8>,
    packed: Vec<u8>,
}

impl Frame {
    /// The magic number, the form of the blocks, and a checksum of that form.
    const HEADER: [u8; 7] = [0x04, 0x22, 0x4d, 0x18, 0x60, 0x40, 0x82];
    const BLOCK_LEN: usize = 64 << 10;
    /// Room to have at least when a block is full, as there will be others.
    const PACKED_LEN: usize = 256 << 10;
    /// Bit of a block's length: it is not compressed.
    const PLAIN: u32 = 1 << 31;
    /// How far LZ4 jumps where it finds nothing. Most of a batch is the same from record to record and found in long
    /// pieces: against 1, the compression took half the time at 4 and a third at 10, for 4 and 6 % more bytes.
    const ACCELERATION: i32 = 8;

    fn new(mut to: Vec<u8>) -> Self {
        to.extend_from_slice(&Frame::HEADER);
        Frame { to, block: Vec::new(), packed: Vec::new() }
    }

    #[inline]
    fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(Frame::BLOCK_LEN - self.block.len()));
            self.block.extend_from_slice(now);
            if self.block.len() == Frame::BLOCK_LEN {
                self.to.reserve(Frame::PACKED_LEN.saturating_sub(self.to.len()));
                self.end_block();
            }
            bytes = rest;
        }
    }

    fn end_block(&mut self) {
        self.packed.resize(compress_bound(self.block.len()).unwrap_or(0), 0);
        let mode = Some(CompressionMode::FAST(Frame::ACCELERATION));
        let packed = compress_to_buffer(&self.block, mode, false, &mut self.packed);
        let (len, bytes) = match packed {
            Ok(len) if len < self.block.len() => (len as u32, &self.packed[..len]),
            _ => (self.block.len() as u32 | Frame::PLAIN, &self.block[..]),
        };
        self.to.extend_from_slice(&len.to_le_bytes());
        self.to.extend_from_slice(bytes);
        self.block.clear();
    }

    fn finish(mut self) -> Vec<u8> {
        if !self.block.is_empty() {
            self.end_block();
        }
        self.to.extend_from_slice(&[0; 4]);
        self.to
    }
}

impl Body {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        match self {
            Body::Plain(to) => to.extend_from_slice(bytes),
            Body::Lz4(frame) => frame.write(bytes),
        }
    }
}

impl Batch {
    /// An empty batch.
    pub(crate) fn new(compression: Compression) -> Self {
        let start = vec![0; HEADER_LEN];
        let body = match compression {
            Compression::None => Body::Plain(start),
            Compression::Lz4 => Body::Lz4(Frame::new(start)),
        };
        Batch {
            body,
            compression,
            count: 0,
            len: 0,
            first_ms: 0,
            greatest_ms: i64::MIN,
            largest: Largest::default(),
            headers: (Vec::new(), 0),
            scratch: Vec::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of its keys and values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A header of the record that is [added](Self::push) next; at most 63.
    pub(crate) fn header(&mut self, name: &str, value: &[u8]) {
        let (bytes, count) = &mut self.headers;
        *count += 1;
        debug_assert!(*count < 64, "the number of headers is one byte");
        length(bytes, name.len());
        bytes.extend_from_slice(name.as_bytes());
        length(bytes, value.len());
        bytes.extend_from_slice(value);
    }

    /// Adds a record.
    pub(crate) fn push(&mut self, record: &Record<'_>) {
        let len = record.key.map_or(0, <[u8]>::len) + record.value.map_or(0, <[u8]>::len);
        if self.count == 0 {
            self.first_ms = record.timestamp_ms;
        }
        if len > self.largest.len || self.count == 0 {
            self.note_largest(record, len);
        }
        self.greatest_ms = self.greatest_ms.max(record.timestamp_ms);
        self.len += len;

        // What stands before the value, what of the record comes behind that, and then before it all the whole length.
        let (headers, headers_count) = (&mut self.headers.0, std::mem::take(&mut self.headers.1));
        let start = &mut self.scratch;
        start.clear();
        start.push(0);
        varint(start, record.timestamp_ms.wrapping_sub(self.first_ms));
        varint(start, i64::from(self.count));
        optional_length(start, record.key);
        start.extend_from_slice(record.key.unwrap_or_default());
        optional_length(start, record.value);
        let start_len = start.len();
        let record_len = start_len + record.value.map_or(0, <[u8]>::len) + 1 + headers.len();
        length(start, record_len);
        let parts = [
            &start[start_len..],
            &start[..start_len],
            record.value.unwrap_or_default(),
            // Zigzag, one byte as long as there are no more than 63.
            &[headers_count << 1],
            headers,
        ];
        for part in parts {
            self.body.write(part);
        }
        headers.clear();
        self.count += 1;
    }

    #[cold]
    fn note_largest(&mut self, record: &Record<'_>, len: usize) {
        let key = record.key.unwrap_or_default();
        let key = String::from_utf8_lossy(&key[..key.len().min(KEY_SHOWN_LEN)]).into_owned();
        self.largest = Largest { key, len };
    }

    /// Ends the batch, of which the first record is number `sequence` of `producer` in its partition.
    pub(crate) fn finish(self, producer: ProducerId, sequence: i32) -> Written {
        let mut bytes = match self.body {
            Body::Plain(bytes) => bytes,
            Body::Lz4(frame) => frame.finish(),
        };
        let length = (bytes.len() - LENGTH_AT - 4) as i32;
        let mut header = &mut bytes[..HEADER_LEN];
        let mut put = |field: &[u8]| header.write_all(field).expect("the header holds its fields");
        put(&0_i64.to_be_bytes());
        put(&length.to_be_bytes());
        put(&(-1_i32).to_be_bytes());
        put(&[MAGIC]);
        put(&[0; 4]);
        put(&(self.compression.attributes() | TRANSACTIONAL).to_be_bytes());
        put(&(self.count - 1).to_be_bytes());
        put(&self.first_ms.to_be_bytes());
        put(&self.greatest_ms.to_be_bytes());
        put(&producer.id.to_be_bytes());
        put(&producer.epoch.to_be_bytes());
        put(&sequence.to_be_bytes());
        put(&self.count.to_be_bytes());
        let crc = crc32c::crc32c(&bytes[CRC_AT + 4..]);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_be_bytes());
        Written { bytes: bytes.into(), count: self.count, largest: self.largest }
    }
}

fn optional_length(to: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        Some(bytes) => length(to, bytes.len()),
        None => varint(to, -1),
    }
}

fn length(to: &mut Vec<u8>, len: usize) {
    varint(to, len as i64);
}

/// A number as zigzag varint.
fn varint(to: &mut Vec<u8>, number: i64) {
    let mut rest = ((number << 1) ^ (number >> 63)) as u64;
    while rest >= 0x80 {
        to.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    to.push(rest as u8);
}

#[cfg(test)]
mod tests {
    use kafka_protocol::records::RecordBatchDecoder;

    use super::*;

    /// The decoder of another hand reads what is written.
    #[test]
    fn another_decoder_reads_it() {
        let mut batch = Batch::new(Compression::None);
        let long = vec![b'x'; 100_000];
        let records = [
            (Some(&b"k"[..]), Some(&b"v"[..]), 1_000, vec![("one", &b"1"[..]), ("empty", b"")]),
            (None, None, 900, vec![]),
            (Some(b""), Some(&long), 2_000_000_000_000, vec![("two", b"2")]),
        ];
        for (key, value, timestamp_ms, headers) in &records {
            headers.iter().for_each(|(name, value)| batch.header(name, value));
            batch.push(&Record { key: *key, value: *value, timestamp_ms: *timestamp_ms });
        }
        assert_eq!(batch.largest.len, long.len());
        let written = batch.finish(ProducerId { id: 7, epoch: 3 }, i32::MAX);
        assert_eq!(written.count, 3);
        let read = RecordBatchDecoder::decode(&mut written.bytes.clone()).unwrap().records;
        assert_eq!(read.len(), records.len());
        for (record, (key, value, timestamp_ms, headers)) in read.iter().zip(&records) {
            assert_eq!((record.key.as_deref(), record.value.as_deref()), (*key, *value));
            assert_eq!(record.timestamp, *timestamp_ms);
            let found: Vec<(&str, &[u8])> = record
                .headers
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_deref().unwrap_or_default()))
                .collect();
            assert_eq!(found, *headers);
            assert!(record.transactional);
            assert_eq!((record.producer_id, record.producer_epoch), (7, 3));
        }
        assert_eq!(read[0].sequence, i32::MAX);
    }

    #[test]
    fn lz4_holds_the_same_records() {
        // Blocks of it do not become smaller.
        let mut state = 88_172_645_463_325_252_u64;
        let mut noise = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        let noise: Vec<u8> = (0..200_000).map(|_| noise()).collect();
        let write = |compression| {
            let mut batch = Batch::new(compression);
            for number in 0..10_000_i64 {
                batch.header("millrace.position", b"0/16B3748:t:5");
                let value = format!("{{\"number\":{number}}}");
                let value = if number == 5_000 { &noise[..] } else { value.as_bytes() };
                batch.push(&Record { key: Some(b"k"), value: Some(value), timestamp_ms: number });
            }
            batch.finish(ProducerId { id: 1, epoch: 0 }, 0).bytes
        };
        let (plain, packed) = (write(Compression::None), write(Compression::Lz4));
        assert!(packed.len() < plain.len() / 2);
        let mut unpacked = Vec::new();
        let mut decoder = lz4::Decoder::new(&packed[HEADER_LEN..]).unwrap();
        std::io::copy(&mut decoder, &mut unpacked).unwrap();
        assert_eq!(unpacked, plain[HEADER_LEN..]);
    }
}
