// SPDX-License-Identifier: GPL-2.0-only
/* MPEG transport streams (ISO/IEC 13818-1): where a decoder may begin. */
#include <linux/mm.h>
#include "omss.h"

#define SYNC_BYTE	0x47
#define RTP_HEADER	12

static unsigned int pid_of(const u8 *packet)
{
	return (packet[1] & 0x1f) << 8 | packet[2];
}

static bool unit_starts(const u8 *packet)
{
	return packet[1] & 0x40;
}

/* Where the payload begins; the packet's end if it has none. */
static unsigned int payload_of(const u8 *packet)
{
	if (!(packet[3] & 0x10))
		return OMSS_TS_PACKET;
	return packet[3] & 0x20 ? min(5u + packet[4], (unsigned int)OMSS_TS_PACKET) : 4;
}

static bool random_access(const u8 *packet)
{
	return (packet[3] & 0x20) && packet[4] && (packet[5] & 0x40);
}

/* A PAT begins here: an entry does too. */
bool omss_ts_begins(const u8 *packet)
{
	return packet[0] == SYNC_BYTE && !pid_of(packet) && unit_starts(packet);
}

/* What a decoder begins with, if there is any: stream types of ISO/IEC 13818-1, table 2-34. */
static bool is_video(u8 stream_type)
{
	switch (stream_type) {
	case 0x01:	/* MPEG-1 */
	case 0x02:	/* MPEG-2 */
	case 0x10:	/* MPEG-4 */
	case 0x1b:	/* H.264, and its kin */
	case 0x1e:
	case 0x1f:
	case 0x20:
	case 0x21:	/* JPEG 2000 */
	case 0x24:	/* HEVC */
	case 0x33:	/* VVC */
	case 0x42:	/* AVS */
	case 0xd1:	/* Dirac */
	case 0xea:	/* VC-1 */
		return true;
	}
	return false;
}

/*
 * Where the section that begins in a packet is; of one longer than a packet what is in the first. @end: without the CRC. Its
 * first byte, 0 if it makes no sense.
 */
static unsigned int section_of(const u8 *packet, unsigned int head, unsigned int *end)
{
	unsigned int at = payload_of(packet);

	if (at >= OMSS_TS_PACKET)
		return 0;
	at += 1 + packet[at];
	if (at + head > OMSS_TS_PACKET)
		return 0;
	*end = at + 3 + ((packet[at + 1] & 0x0f) << 8 | packet[at + 2]);
	*end = min(*end, OMSS_TS_PACKET + 4u) - 4;
	return at;
}

/* The PIDs of the PMTs. */
static void read_programs(struct omss_ts *ts, const u8 *packet)
{
	unsigned int end, at = section_of(packet, 8, &end);

	bitmap_zero(ts->programs, OMSS_TS_PIDS);
	if (!at || packet[at])
		return;
	for (at += 8; at + 4 <= end; at += 4) {
		if (packet[at] || packet[at + 1]) /* program 0 is the network's */
			__set_bit(pid_of(packet + at + 1), ts->programs);
	}
}

/* Adds the PIDs of a PMT's video streams, or of all its streams; whether there were any. */
static bool add_streams(struct omss_ts *ts, const u8 *packet, bool only_video)
{
	unsigned int end, at = section_of(packet, 12, &end);
	bool any = false;

	if (!at)
		return false;
	at += 12 + ((packet[at + 10] & 0x0f) << 8 | packet[at + 11]);
	for (; at + 5 <= end; at += 5 + ((packet[at + 3] & 0x0f) << 8 | packet[at + 4])) {
		if (only_video && !is_video(packet[at]))
			continue;
		__set_bit(pid_of(packet + at), ts->streams);
		any = true;
	}
	return any;
}

/*
 * A whole packet that is, or will be, in entry `seq`. Where there is video its pictures are the places to begin: every packet of
 * sound may be one.
 */
void omss_ts_packet(struct omss_ts *ts, struct omss_ring *ring, const u8 *packet, u64 seq)
{
	unsigned int pid = pid_of(packet);

	if (omss_ts_begins(packet)) {
		read_programs(ts, packet);
		bitmap_zero(ts->streams, OMSS_TS_PIDS);
		ts->have_pat = true;
		ts->pat = seq;
	} else if (test_bit(pid, ts->programs)) {
		if (unit_starts(packet) && !add_streams(ts, packet, true))
			add_streams(ts, packet, false);
	} else if (ts->have_pat && test_bit(pid, ts->streams) && random_access(packet)) {
		omss_ring_mark(ring, ts->pat);
		ts->have_pat = false;
	}
}

bool omss_ts_synced(const u8 *packet)
{
	return packet[0] == SYNC_BYTE;
}

/* How many bytes are before the next packet. A sync byte counts if that of the one after it is there, or is yet to come. */
u32 omss_ts_resync(const u8 *bytes, u32 count)
{
	u32 at;

	for (at = 0; at < count; at++) {
		if (bytes[at] != SYNC_BYTE)
			continue;
		if (at + OMSS_TS_PACKET >= count || bytes[at + OMSS_TS_PACKET] == SYNC_BYTE)
			break;
	}
	return at;
}

/* A datagram is an entry as it is; looked at if in one piece, as it nearly always is. */
void omss_ts_datagram(struct omss_ts *ts, struct omss_ring *ring, const struct omss_entry *entry)
{
	u32 at = entry->bytes % OMSS_TS_PACKET;
	const u8 *bytes;

	if (entry->frags != 1 || (at && at != RTP_HEADER))
		return;
	bytes = page_address(entry->frag[0].bv_page) + entry->frag[0].bv_offset;
	for (; at < entry->bytes; at += OMSS_TS_PACKET) {
		if (bytes[at] == SYNC_BYTE)
			omss_ts_packet(ts, ring, bytes + at, ring->head);
	}
}
