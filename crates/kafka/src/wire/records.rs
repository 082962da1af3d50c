//! Record batches as a broker gives them (format 2; [`batch`](super::batch) draws it): checked, without what was aborted,
//! and taken apart where they were decompressed, so that no record is copied.

use std::io::{self, Read};
use std::ops::Range;

use bytes::Bytes;
use kafka_protocol::compression::{Decompressor, Gzip, Snappy, Zstd};
use kafka_protocol::messages::fetch_response::AbortedTransaction;
use worker::LogBatch;

use super::batch::{CRC_AT, HEADER_LEN, LENGTH_AT, MAGIC, TRANSACTIONAL};

/// Bit of the attributes: the batch is a transaction's marker.
const CONTROL: i16 = 0x20;
/// Bits of the attributes: how the records are compressed.
const CODEC: i16 = 0x07;
/// The second number of a marker's key: the transaction was aborted.
const ABORT: i16 = 0;

/// A batch that is whole.
pub(crate) struct Encoded {
    first: i64,
    /// The offset after its last record, which compaction may have taken.
    pub(crate) end: i64,
    /// Of the leader that wrote it.
    pub(crate) leader_epoch: i32,
    attributes: i16,
    producer: i64,
    count: i32,
    records: Bytes,
}

/// The batches in a broker's answer, checked. What is cut short at the end is left out: brokers send so many bytes, and not
/// more.
pub(crate) fn batches(mut bytes: Bytes) -> Result<Vec<Encoded>, String> {
    let mut all = Vec::new();
    while bytes.len() >= HEADER_LEN {
        let int = |at: usize| i32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| i64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let first = long(0);
        let damaged = |what: &str| format!("the batch at offset {first} {what}");
        let len =
            usize::try_from(int(LENGTH_AT)).map_err(|_| damaged("has a negative length"))? + LENGTH_AT + 4;
        if bytes[LENGTH_AT + 8] != MAGIC {
            return Err(damaged("has a format from before Kafka 0.11, which has no transactions"));
        }
        if len < HEADER_LEN {
            return Err(damaged("is shorter than its header"));
        }
        if bytes.len() < len {
            break;
        }
        if crc32c::crc32c(&bytes[CRC_AT + 4..len]) != int(CRC_AT) as u32 {
            return Err(damaged("is damaged: its checksum is another"));
        }
        all.push(Encoded {
            first,
            end: first.saturating_add(i64::from(int(CRC_AT + 6))).saturating_add(1),
            leader_epoch: int(LENGTH_AT + 4),
            attributes: i16::from_be_bytes([bytes[CRC_AT + 4], bytes[CRC_AT + 5]]),
            producer: long(CRC_AT + 26),
            count: int(HEADER_LEN - 4),
            records: bytes.slice(HEADER_LEN..len),
        });
        bytes = bytes.slice(len..);
    }
    Ok(all)
}

/// Which transactions in an answer were aborted, as its batches come one by one.
pub(crate) struct Aborted {
    /// By their first offsets, the last one in front.
    to_come: Vec<AbortedTransaction>,
    producers: Vec<i64>,
}

impl Aborted {
    pub(crate) fn new(mut all: Vec<AbortedTransaction>) -> Self {
        all.sort_by_key(|transaction| std::cmp::Reverse(transaction.first_offset));
        Aborted { to_come: all, producers: Vec::new() }
    }

    /// Whether the batch that comes next is one of committed records.
    pub(crate) fn committed(&mut self, batch: &Encoded) -> bool {
        while let Some(begun) = self.to_come.pop_if(|transaction| transaction.first_offset < batch.end) {
            self.producers.push(begun.producer_id.0);
        }
        if batch.attributes & CONTROL != 0 {
            if marker(&batch.records) == Some(ABORT) {
                self.producers.retain(|producer| *producer != batch.producer);
            }
            return false;
        }
        batch.attributes & TRANSACTIONAL == 0 || !self.producers.contains(&batch.producer)
    }
}

/// What a control batch says of its transaction.
fn marker(records: &[u8]) -> Option<i16> {
    let mut parts = Parts { bytes: records, at: 0 };
    let key = parts.record()?.key?;
    let kind = records.get(key)?.get(2..4)?;
    Some(i16::from_be_bytes([kind[0], kind[1]]))
}

/// Why a batch's records, or those from one on, cannot be read.
pub(crate) struct Unreadable {
    pub(crate) offset: i64,
    pub(crate) reason: String,
}

impl Encoded {
    /// Appends the records at `from` and after it. Where one cannot be read, those before it are appended.
    pub(crate) fn append_to(&self, batch: &mut LogBatch, from: i64) -> Result<(), Unreadable> {
        let unreadable = |offset: i64, reason: String| Unreadable { offset: offset.max(from), reason };
        let bytes = batch.bytes_mut();
        let mut at = bytes.len();
        self.decompress(bytes)
            .map_err(|error| unreadable(self.first, format!("its batch cannot be decompressed: {error}")))?;
        let mut next = self.first;
        let mut headers = Vec::new();
        for _ in 0..self.count {
            let mut parts = Parts { bytes: batch.bytes_mut(), at };
            let cut = || unreadable(next, "its batch ends within it".to_owned());
            let record = parts.record().ok_or_else(cut)?;
            headers.clear();
            for _ in 0..record.headers {
                headers.push(parts.header().ok_or_else(cut)?);
            }
            at = parts.at;
            let offset = self.first.wrapping_add(record.offset_delta);
            next = offset.wrapping_add(1);
            if offset >= from {
                let (key, value) = (record.key.unwrap_or_default(), record.value.unwrap_or_default());
                batch
                    .push_at(offset, key, value, headers.drain(..))
                    .map_err(|error| unreadable(offset, error.to_string()))?;
            }
        }
        Ok(())
    }

    fn decompress(&self, to: &mut Vec<u8>) -> io::Result<()> {
        let compressed = &mut self.records.clone();
        let copy = |plain: &mut Bytes| {
            to.extend_from_slice(plain);
            Ok(())
        };
        match self.attributes & CODEC {
            0 => to.extend_from_slice(compressed),
            1 => Gzip::decompress(compressed, copy).map_err(io::Error::other)?,
            2 => Snappy::decompress(compressed, copy).map_err(io::Error::other)?,
            3 => drop(lz4::Decoder::new(&compressed[..])?.read_to_end(to)?),
            4 => Zstd::decompress(compressed, copy).map_err(io::Error::other)?,
            other => return Err(io::Error::other(format!("nothing is known of codec {other}"))),
        }
        Ok(())
    }
}

/// Records, taken apart from the front.
struct Parts<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Where the parts of a record are.
struct Record {
    offset_delta: i64,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    /// How many follow.
    headers: i64,
}

impl Parts<'_> {
    /// All of a record but its headers.
    fn record(&mut self) -> Option<Record> {
        let _len = self.varint()?;
        // The attributes, of which none is in use.
        self.at += 1;
        let _timestamp_delta = self.varint()?;
        Some(Record {
            offset_delta: self.varint()?,
            key: self.piece()?,
            value: self.piece()?,
            headers: self.varint()?,
        })
    }

    fn header(&mut self) -> Option<(Range<usize>, Range<usize>)> {
        Some((self.piece()??, self.piece()?.unwrap_or_default()))
    }

    /// A length and so many bytes; -1 for none.
    #[inline]
    fn piece(&mut self) -> Option<Option<Range<usize>>> {
        let Ok(len) = usize::try_from(self.varint()?) else { return Some(None) };
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len())?;
        Some(Some(std::mem::replace(&mut self.at, end)..end))
    }

    /// A number as zigzag varint.
    #[inline]
    fn varint(&mut self) -> Option<i64> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some((number >> 1) as i64 ^ -((number & 1) as i64));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use kafka_protocol::messages::ProducerId as ProducerNumber;
    use kafka_protocol::protocol::StrBytes;
    use kafka_protocol::records::{
        Compression as Codec, Record as Written, RecordBatchEncoder, RecordEncodeOptions, TimestampType,
    };
    use proptest::prelude::*;

    use super::super::batch::{Batch, Compression, ProducerId, Record};
    use super::*;

    const PRODUCER: ProducerId = ProducerId { id: 7, epoch: 1 };

    /// Records of another hand's encoder, from `first` on, with a position each.
    fn encoded(first: i64, count: i64, codec: Codec) -> Bytes {
        let record = |offset: i64| Written {
            transactional: true,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: 5,
            producer_id: PRODUCER.id,
            producer_epoch: PRODUCER.epoch,
            timestamp_type: TimestampType::Creation,
            offset,
            sequence: offset as i32,
            timestamp: 1_000 + offset,
            key: (offset % 2 == 0).then(|| Bytes::from(format!("key {offset}"))),
            value: Some(Bytes::from(format!("value {offset}").repeat(50))),
            headers: [
                (
                    StrBytes::from_static_str("millrace.position"),
                    Some(Bytes::from(format!("0/{offset:X}:t:0"))),
                ),
                (StrBytes::from_static_str("of others"), None),
                (StrBytes::from_static_str("millrace.unchanged"), Some(Bytes::from_static(b"[\"a\"]"))),
            ]
            .into(),
        };
        let records: Vec<Written> = (first..first + count).map(record).collect();
        let mut bytes = BytesMut::new();
        let options = RecordEncodeOptions { version: 2, compression: codec };
        RecordBatchEncoder::encode(&mut bytes, &records, &options).unwrap();
        bytes.freeze()
    }

    fn marker_of(offset: i64, producer: i64, kind: i16) -> Bytes {
        let mut batch = Batch::new(Compression::None);
        let key = [0, 0, kind.to_be_bytes()[0], kind.to_be_bytes()[1]];
        batch.push(&Record { key: Some(&key), value: Some(b""), timestamp_ms: 0 });
        let mut bytes = batch.finish(ProducerId { id: producer, ..PRODUCER }, -1).bytes.to_vec();
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[CRC_AT + 5] |= CONTROL as u8;
        let crc = crc32c::crc32c(&bytes[CRC_AT + 4..]);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_be_bytes());
        bytes.into()
    }

    fn read(bytes: &Bytes, from: i64, aborted: Vec<AbortedTransaction>) -> Result<LogBatch, String> {
        let (mut batch, mut aborted) = (LogBatch::default(), Aborted::new(aborted));
        for encoded in batches(bytes.clone())? {
            if aborted.committed(&encoded) {
                encoded.append_to(&mut batch, from).map_err(|error| error.reason)?;
            }
        }
        Ok(batch)
    }

    fn offsets(batch: &LogBatch) -> Vec<i64> {
        (0..batch.len()).map(|place| batch.get(place).offset).collect()
    }

    #[test]
    fn every_codec_is_read() {
        for codec in [Codec::None, Codec::Gzip, Codec::Snappy, Codec::Zstd] {
            let bytes = encoded(10, 1_000, codec);
            assert_eq!(batches(bytes.clone()).unwrap()[0].leader_epoch, 5);
            let batch = read(&bytes, 12, Vec::new()).unwrap();
            assert_eq!(offsets(&batch), (12..1_010).collect::<Vec<_>>(), "{codec:?}");
            for (place, offset) in (12..1_010).enumerate() {
                let record = batch.get(place);
                let key = if offset % 2 == 0 { format!("key {offset}") } else { String::new() };
                assert_eq!(record.key, key.as_bytes());
                assert_eq!(record.value, format!("value {offset}").repeat(50).as_bytes());
                assert_eq!(record.position.unwrap().to_string(), format!("0/{offset:X}:t:0"));
                assert_eq!((record.unchanged, record.previous_key), (&b"[\"a\"]"[..], &b""[..]));
            }
        }
    }

    /// 3,000 records of our own writer.
    fn written(compression: Compression) -> Bytes {
        let mut batch = Batch::new(compression);
        for number in 0..3_000_i64 {
            batch.header("millrace.position", b"0/16B3748:t:5 xid=745 schema=16384/3 commit=0/16B37A0");
            let value = format!("{number}").repeat(40);
            batch.push(&Record { key: None, value: Some(value.as_bytes()), timestamp_ms: -number });
        }
        batch.finish(PRODUCER, 0).bytes
    }

    #[test]
    fn what_the_writer_writes_is_read() {
        for compression in [Compression::None, Compression::Lz4] {
            let read = read(&written(compression), 0, Vec::new()).unwrap();
            assert_eq!(offsets(&read), (0..3_000).collect::<Vec<_>>());
            assert_eq!(read.get(2_999).value, "2999".repeat(40).as_bytes());
        }
    }

    #[test]
    fn a_record_is_read_without_an_allocation() {
        let encoded = batches(written(Compression::Lz4)).unwrap().remove(0);
        let mut batch = LogBatch::default();
        let read = |batch: &mut LogBatch| {
            batch.clear();
            encoded.append_to(batch, 0).map_err(|error| error.reason).unwrap();
        };
        // The batch takes its size.
        read(&mut batch);
        let reading = allocation_counter::measure(|| read(&mut batch));
        assert_eq!(batch.len(), 3_000);
        assert!(reading.count_total <= 8, "{} allocations for a batch", reading.count_total);
    }

    #[test]
    fn aborted_transactions_and_markers_are_left_out() {
        const COMMIT: i16 = 1;
        let parts = [
            encoded(0, 2, Codec::None),
            marker_of(2, PRODUCER.id, COMMIT),
            encoded(3, 2, Codec::None),
            // Of another's transaction.
            marker_of(5, 8, ABORT),
            encoded(6, 2, Codec::None),
            marker_of(8, PRODUCER.id, ABORT),
            encoded(9, 2, Codec::None),
            marker_of(11, PRODUCER.id, COMMIT),
        ];
        let bytes = Bytes::from(parts.concat());
        let aborted = |producer: i64, first| {
            let producer = ProducerNumber(producer);
            AbortedTransaction::default().with_producer_id(producer).with_first_offset(first)
        };
        let read = read(&bytes, 0, vec![aborted(PRODUCER.id, 3), aborted(8, 1)]).unwrap();
        assert_eq!(offsets(&read), [0, 1, 9, 10]);
        assert_eq!(batches(bytes).unwrap().last().unwrap().end, 12);
    }

    #[test]
    fn what_is_damaged_is_found_and_what_is_cut_short_is_left_out() {
        let bytes = [encoded(0, 2, Codec::Zstd), encoded(2, 2, Codec::Zstd)].concat();
        let first = encoded(0, 2, Codec::Zstd).len();
        for cut in first..bytes.len() {
            let whole = batches(Bytes::copy_from_slice(&bytes[..cut])).unwrap();
            assert_eq!(whole.iter().map(|batch| batch.end).collect::<Vec<_>>(), [2]);
        }
        for at in CRC_AT..first {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert!(batches(bytes.into()).is_err(), "{at}");
        }
    }

    proptest! {
        /// Whatever stands behind a right checksum.
        #[test]
        fn nonsense_is_an_error(body: Vec<u8>, count in 0..100_i32, codec in 0..8_u8) {
            let mut bytes = vec![0; HEADER_LEN];
            bytes[LENGTH_AT + 8] = MAGIC;
            bytes[CRC_AT + 5] = codec;
            bytes[HEADER_LEN - 4..].copy_from_slice(&count.to_be_bytes());
            bytes.extend_from_slice(&body);
            let len = (bytes.len() - LENGTH_AT - 4) as i32;
            bytes[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&len.to_be_bytes());
            let crc = crc32c::crc32c(&bytes[CRC_AT + 4..]);
            bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_be_bytes());
            let _ = read(&bytes.into(), 0, Vec::new());
        }
    }
}
