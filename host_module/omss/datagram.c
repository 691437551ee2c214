// SPDX-License-Identifier: GPL-2.0-only
/*
 * One datagram of shared payload, without the detour through sendmsg(): nearly half
 * of what that costs is to gather, for each sink anew, what is the same for all.
 *
 * The packet is made as L2TP makes those that it sends on a UDP socket: our header,
 * then ip_queue_xmit() or ip6_xmit(), so that routes, netfilter, qdiscs and counters
 * see what they see of any other. It is charged to the socket, and waits for room
 * there, as usual. What is not usual about a socket, a route or a packet (options,
 * cork, timestamps, IPsec, multicast, too long, an error to be told, closed) is left to
 * the socket layer: it knows, and it looks up the route when the one we have has aged.
 */
#include <linux/ipv6.h>
#include <linux/skbuff.h>
#include <linux/udp.h>
#include <net/dst.h>
#include <net/ip.h>
#include <net/ip6_checksum.h>
#include <net/ipv6.h>
#include <net/route.h>
#include <net/udp.h>
#include "omss.h"

/* Nothing is set on the socket that only the socket layer understands. */
static bool is_plain(const struct sock *sk)
{
	return !READ_ONCE(udp_sk(sk)->pending) && !udp_test_bit(CORK, sk) &&
	       !READ_ONCE(udp_sk(sk)->gso_size) && !READ_ONCE(sk->sk_tsflags) &&
	       !sock_flag(sk, SOCK_LOCALROUTE) && !sock_flag(sk, SOCK_TXTIME) &&
	       !sock_flag(sk, SOCK_DEAD) &&
	       !READ_ONCE(sk->sk_err) && !(READ_ONCE(sk->sk_shutdown) & SEND_SHUTDOWN) &&
	       sk_wmem_alloc_get(sk) < READ_ONCE(sk->sk_sndbuf);
}

static bool is_plain4(const struct sock *sk, const struct dst_entry *dst)
{
	unsigned int flags = container_of(dst, struct rtable, dst)->rt_flags;

	return !rcu_access_pointer(inet_sk(sk)->inet_opt) &&
	       !(flags & (RTCF_MULTICAST | RTCF_BROADCAST));
}

static bool is_plain6(const struct sock *sk)
{
	return !rcu_access_pointer(inet6_sk(sk)->opt) &&
	       !ipv6_addr_is_multicast(&sk->sk_v6_daddr);
}

/* The socket's route, if it still holds and takes so many bytes as they are. Under RCU. */
static struct dst_entry *route(struct sock *sk, size_t bytes)
{
	struct dst_entry *dst = rcu_dereference(sk->sk_dst_cache);
	bool six;

	if (!dst || dst_xfrm(dst) || dst->lwtstate)
		return NULL;
	six = dst->ops->family == AF_INET6;
	if (dst->obsolete && !dst->ops->check(dst, six ? inet6_sk(sk)->dst_cookie : 0))
		return NULL;
	bytes += sizeof(struct udphdr) + (six ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	if (bytes > dst_mtu(dst))
		return NULL;
	return (six ? is_plain6(sk) : is_plain4(sk, dst)) ? dst : NULL;
}

/* Payload and UDP header, charged to the socket. */
static struct sk_buff *make_packet(struct sock *sk, const struct dst_entry *dst,
				   const struct bio_vec *frag, unsigned int frags, size_t bytes)
{
	unsigned int i, room = LL_RESERVED_SPACE(dst->dev) + sizeof(struct ipv6hdr) +
			       sizeof(struct udphdr);
	struct udphdr *header;
	struct sk_buff *skb;

	skb = alloc_skb(room, GFP_NOWAIT | __GFP_NOWARN);
	if (!skb)
		return NULL;
	skb_reserve(skb, room);
	for (i = 0; i < frags; i++) {
		get_page(frag[i].bv_page);
		skb_fill_page_desc(skb, i, frag[i].bv_page, frag[i].bv_offset, frag[i].bv_len);
	}
	skb_shinfo(skb)->flags |= SKBFL_SHARED_FRAG;
	skb->len += bytes;
	skb->data_len += bytes;
	skb->truesize += bytes;
	header = skb_push(skb, sizeof(*header));
	skb_reset_transport_header(skb);
	header->source = inet_sk(sk)->inet_sport;
	header->dest = inet_sk(sk)->inet_dport;
	header->len = htons(skb->len);
	header->check = 0;
	skb_set_owner_w(skb, sk);
	return skb;
}

static int send4(struct sock *sk, struct sk_buff *skb)
{
	const struct inet_sock *inet = inet_sk(sk);
	struct flowi flow = { };

	flow.u.ip4.saddr = inet->inet_saddr;
	flow.u.ip4.daddr = inet->inet_daddr;
	udp_set_csum(sk->sk_no_check_tx, skb, inet->inet_saddr, inet->inet_daddr, skb->len);
	UDP_INC_STATS(sock_net(sk), UDP_MIB_OUTDATAGRAMS, 0);
	return ip_queue_xmit(sk, skb, &flow);
}

static int send6(struct sock *sk, struct sk_buff *skb)
{
#if IS_ENABLED(CONFIG_IPV6)
	const struct ipv6_pinfo *np = inet6_sk(sk);
	struct flowi6 flow = {
		.flowi6_proto = IPPROTO_UDP,
		.flowlabel = np->flow_label,
		.saddr = np->saddr,
		.daddr = sk->sk_v6_daddr,
		.fl6_sport = inet_sk(sk)->inet_sport,
		.fl6_dport = inet_sk(sk)->inet_dport,
	};

	udp6_set_csum(udp_get_no_check6_tx(sk), skb, &flow.saddr, &flow.daddr, skb->len);
	UDP6_INC_STATS(sock_net(sk), UDP_MIB_OUTDATAGRAMS, 0);
	return ip6_xmit(sk, skb, &flow, READ_ONCE(sk->sk_mark), NULL, np->tclass,
			READ_ONCE(sk->sk_priority));
#else
	kfree_skb(skb);
	return -EAFNOSUPPORT;
#endif
}

/* All of it in one packet: `bytes`, an error, or 0: nothing was done, the socket layer must. */
int omss_send_datagram(struct sock *sk, const struct bio_vec *frag, unsigned int frags,
		       size_t bytes)
{
	struct dst_entry *dst;
	struct sk_buff *skb;
	int err = 0;

	if (frags > MAX_SKB_FRAGS || !is_plain(sk))
		return 0;
	rcu_read_lock();
	dst = route(sk, bytes);
	skb = dst ? make_packet(sk, dst, frag, frags, bytes) : NULL;
	if (!skb)
		goto out;
	skb_dst_set_noref(skb, dst);
	err = dst->ops->family == AF_INET6 ? send6(sk, skb) : send4(sk, skb);
	/* A full queue on the way is no error to a datagram. */
	err = err < 0 && err != -ENOBUFS ? err : bytes;
out:
	rcu_read_unlock();
	return err;
}
