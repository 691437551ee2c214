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

/* The PIDs of the PMTs; of a PAT longer than a packet those in the first. */
static void read_programs(struct omss_ts *ts, const u8 *packet)
{
	unsigned int at = payload_of(packet), end;

	bitmap_zero(ts->programs, OMSS_TS_PIDS);
	if (at >= OMSS_TS_PACKET)
		return;
	at += 1 + packet[at];
	if (at + 8 > OMSS_TS_PACKET || packet[at])
		return;
	end = at + 3 + ((packet[at + 1] & 0x0f) << 8 | packet[at + 2]);
	end = min(end, OMSS_TS_PACKET + 4u) - 4; /* the CRC */
	for (at += 8; at + 4 <= end; at += 4) {
		if (packet[at] || packet[at + 1]) /* program 0 is the network's */
			__set_bit(pid_of(packet + at + 1), ts->programs);
	}
}

/* A whole packet that is, or will be, in entry `seq`. */
void omss_ts_packet(struct omss_ts *ts, struct omss_ring *ring, const u8 *packet, u64 seq)
{
	unsigned int pid = pid_of(packet);

	if (omss_ts_begins(packet)) {
		read_programs(ts, packet);
		ts->have_pat = true;
		ts->have_pmt = false;
		ts->pat = seq;
	} else if (test_bit(pid, ts->programs)) {
		ts->have_pmt |= unit_starts(packet);
	} else if (ts->have_pat && ts->have_pmt && random_access(packet)) {
		omss_ring_mark(ring, ts->pat);
		ts->have_pat = false;
	}
}

bool omss_ts_synced(const u8 *packet)
{
	return packet[0] == SYNC_BYTE;
}

/* How many bytes to leave out in a gap. A sync byte counts if the next packet has one too. */
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
