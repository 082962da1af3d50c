use change::{Lsn, Tuple};

use crate::DecodeError;

/// 2000-01-01, the epoch of Postgres, in microseconds since the Unix epoch.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Takes fields off the front of one message's bytes.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    tag: char,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(tag: u8, rest: &'a [u8]) -> Self {
        Reader { tag: char::from(tag), rest }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(DecodeError::Truncated(self.tag))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(DecodeError::Truncated(self.tag))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn i32(&mut self) -> Result<i32, DecodeError> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    pub(crate) fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        Ok(Lsn(u64::from_be_bytes(self.array()?)))
    }

    /// A timestamp, as microseconds since the Unix epoch. Times that do not fit, which no clock shows, become the
    /// nearest that does.
    pub(crate) fn time(&mut self) -> Result<i64, DecodeError> {
        Ok(i64::from_be_bytes(self.array()?).saturating_add(POSTGRES_EPOCH_US))
    }

    /// A NUL-terminated string, without the NUL.
    pub(crate) fn str(&mut self) -> Result<&'a str, DecodeError> {
        let end = self.rest.iter().position(|byte| *byte == 0).ok_or(DecodeError::Truncated(self.tag))?;
        let text = self.bytes(end)?;
        self.bytes(1)?;
        std::str::from_utf8(text).map_err(|_| DecodeError::NotUtf8(self.tag))
    }

    pub(crate) fn tuple(&mut self) -> Result<Tuple<'a>, DecodeError> {
        let (tuple, rest) =
            Tuple::parse(self.rest).map_err(|error| DecodeError::Tuple { tag: self.tag, error })?;
        self.rest = rest;
        Ok(tuple)
    }

    pub(crate) fn unknown<T>(&self, what: &'static str, byte: u8) -> Result<T, DecodeError> {
        Err(DecodeError::UnknownByte { tag: self.tag, what, byte })
    }

    /// What is left, for a message whose end the caller has checked or will walk.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn end(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(DecodeError::Trailing { tag: self.tag, extra }),
        }
    }
}
