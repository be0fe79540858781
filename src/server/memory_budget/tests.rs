use super::*;

fn reserved_bytes(budget: &MemoryBudget) -> usize {
    budget.reserved_bytes.load(Ordering::SeqCst)
}

#[test]
fn call_over_budget_is_refused_and_dropped_calls_release_everything() {
    let budget = MemoryBudget::with_max_bytes(8 * CALL_OVERHEAD);
    let calls: Vec<MemoryReservation> = (0..8).map(|_| budget.admit(0).unwrap()).collect();
    assert_eq!(budget.admit(0).err(), Some(OverBudget { limit: 8 * CALL_OVERHEAD }));
    assert_eq!(budget.admit(usize::MAX).err(), Some(OverBudget { limit: 8 * CALL_OVERHEAD }));
    assert_eq!(budget.pending_calls(), 8);
    drop(calls);
    assert_eq!((budget.pending_calls(), reserved_bytes(&budget)), (0, 0));
}

#[test]
fn large_response_leaves_the_reserve_to_small_ones_and_keeps_what_it_has() {
    let budget = MemoryBudget::with_max_bytes(8 * MAX_SMALL_RESPONSE);
    let mut large = budget.admit(0).unwrap();
    large.resize_response(5 * MAX_SMALL_RESPONSE).unwrap();
    assert_eq!(large.resize_response(6 * MAX_SMALL_RESPONSE).err(), Some(OverBudget { limit: 6 * MAX_SMALL_RESPONSE }));
    let mut small = [(); 2].map(|()| budget.admit(0).unwrap());
    assert!(small[0].resize_response(MAX_SMALL_RESPONSE + 1).is_err());
    for call in &mut small {
        call.resize_response(MAX_SMALL_RESPONSE).unwrap();
    }
    // This request takes the last byte of the budget.
    let _request = budget.admit(MAX_SMALL_RESPONSE - 4 * CALL_OVERHEAD).unwrap();
    assert!(budget.admit(0).is_err());
    large.resize_response(5 * MAX_SMALL_RESPONSE).unwrap();
    large.resize_response(MAX_SMALL_RESPONSE + 1).unwrap();
    large.resize_response(2 * MAX_SMALL_RESPONSE).unwrap();
    drop((large, small));
    assert_eq!((budget.pending_calls(), reserved_bytes(&budget)), (1, MAX_SMALL_RESPONSE - 3 * CALL_OVERHEAD));
}

/// A client must be told the result of a call that has changed something.
#[test]
fn small_response_is_counted_and_never_refused() {
    let budget = MemoryBudget::with_max_bytes(8 * MAX_SMALL_RESPONSE);
    let mut calls: Vec<MemoryReservation> = (0..10).map(|_| budget.admit(0).unwrap()).collect();
    for call in &mut calls {
        call.reserve_response(MAX_SMALL_RESPONSE as u64).unwrap();
    }
    assert!(budget.admit(0).is_err(), "the budget is exceeded");
    calls.truncate(1);
    assert!(calls[0].reserve_response(6 * MAX_SMALL_RESPONSE as u64).is_err());
    calls[0].reserve_response(4 * MAX_SMALL_RESPONSE as u64).unwrap();
    drop(calls);
    assert_eq!((budget.pending_calls(), reserved_bytes(&budget)), (0, 0));
}
